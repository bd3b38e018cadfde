"""A comparison for each group of cases (site, scanner, vendor), and for the differences between groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nnunetv2_ext.compare.scores import Scores
from nnunetv2_ext.compare.statistics import Difference, all_differences, headline, verdict
from nnunetv2_ext.evaluate.groups import Groups, add_groups, as_dict, gap_figures, group_figures, worst_groups
from nnunetv2_ext.evaluate.metrics import Metric


@dataclass
class GroupDifferences:
    """What is compared within and between groups."""

    groups: Groups
    within: dict[str, list[Difference]]  # by group: statistics.all_differences of its cases
    figures: pd.DataFrame  # evaluate.groups.group_figures of each arm's scores, averaged over repeats
    gaps: pd.DataFrame  # gap_figures of the same
    gain_figures: pd.DataFrame  # as figures, of each case's difference to the first arm
    gain_gaps: pd.DataFrame  # as gaps, of the same: does an arm change one group more than the others?

    @property
    def differences(self) -> list[Difference]:
        """Those within the groups, one group after the other."""
        return [d for some in self.within.values() for d in some]

    @property
    def metrics(self) -> dict[str, Metric]:
        return {d.key: d.metric for d in self.differences}

    def answers(self, structure: str) -> list[tuple[str, list[str]]]:
        """What each group says, what they say about each other, and each arm's worst group: heads and their lines."""
        found = []
        for group, differences in self.within.items():
            number = sum(of == group for of in self.groups.of.values())
            for arm in dict.fromkeys(d.arm for d in differences):
                own = [d for d in differences if d.arm == arm and d.structure == structure]
                head = f"**{group}** ({number} cases): {arm} against {own[0].first}: {headline(own)}."
                found.append((head, [verdict(d) for d in own]))
        for what, figures, gaps in (
            ("{} minus " + self.differences[0].first, self.gain_figures, self.gain_gaps),
            ("{}", self.figures, self.gaps),
        ):
            for arm in dict.fromkeys(figures["arm"]):
                some, between = (t[(t["arm"] == arm) & (t["structure"] == structure)] for t in (figures, gaps))
                found.append((f"{what.format(arm)}:", worst_groups(some, between, self.metrics, self.groups.unit)))
        return found

    def as_dict(self, structure: str) -> dict[str, Any]:
        """For comparison.json, without the differences within groups; ``gains``: differences to the first arm."""
        answers = [" ".join([head, *lines]) for head, lines in self.answers(structure)]
        gains = as_dict(self.groups, (), self.gain_figures, self.gain_gaps, self.metrics)
        return {
            **as_dict(self.groups, answers, self.figures, self.gaps, self.metrics),
            "gains": {name: gains[name] for name in ("figures", "differences")},
        }


def compare_groups(scores: Scores, groups: Groups, differences: Sequence[Difference]) -> GroupDifferences:
    """All figures by group; ``differences`` are those over all cases."""
    within = {group: all_differences(scores.only([case for case, of in groups.of.items() if of == group]))
              for group in sorted(set(groups.of.values()))}  # fmt: skip
    averaged = add_groups(scores.averaged, groups)
    gains = pd.concat(
        d.per_case.rename_axis("case").rename("value").reset_index()
        .assign(arm=d.arm, metric=d.key, structure=d.structure)
        for d in differences
    )  # fmt: skip
    gains = add_groups(gains, groups)
    return GroupDifferences(
        groups, within, group_figures(averaged), gap_figures(averaged), group_figures(gains), gap_figures(gains)
    )
