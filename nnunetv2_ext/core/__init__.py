"""The spine: what every method's trainer shares."""
