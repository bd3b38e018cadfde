"""A table with a row per case, as CSV or TSV: what is known of each beside its image (subject, site, scanner)."""

from pathlib import Path

import pandas as pd


def read_column(file: Path, column: str) -> dict[str, str]:
    """Case to its entry in a column, without the blanks around it; "" where there is none.

    Raises:
        ValueError: the file cannot be read, lacks ``case`` or the column, or gives a case two different entries.
    """
    try:
        separator = "\t" if file.suffix.lower() == ".tsv" else ","
        rows = pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")
    except pd.errors.EmptyDataError:
        rows = pd.DataFrame()
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as CSV ({' '.join(str(error).split())})") from error
    rows = rows.fillna("").rename(columns=str.strip)
    if not {"case", column} <= set(rows):
        has = f"it has {', '.join(rows)}" if len(rows.columns) else "it is empty"
        raise ValueError(f"{file} must have the columns case,{column}; {has}")
    found: dict[str, str] = {}
    for case, entry in zip(rows["case"].str.strip(), rows[column].str.strip(), strict=True):
        if found.setdefault(case, entry) != entry:
            raise ValueError(f"{file} gives the case {case!r} two entries of {column}, {found[case]!r} and {entry!r}")
    return found
