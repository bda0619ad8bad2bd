"""The end of the tests' report: what was skipped, summed by reason, and each warning once. pytest itself has a line for
every place of a skip and every test of a warning."""

from collections import Counter


def pytest_terminal_summary(terminalreporter):
    skips = terminalreporter.stats.get("skipped", [])
    warnings = terminalreporter.stats.get("warnings", [])
    reasons = Counter(skip.longrepr[2].removeprefix("Skipped: ") for skip in skips)
    messages = Counter(
        warning.message.strip().partition("\n")[0].rpartition("site-packages/")[2] for warning in warnings
    )
    for name, counter in (("skipped", reasons), ("warning", messages)):
        for text, count in counter.most_common():
            terminalreporter.write_line(f"{name} {count}x: {text}")
