"""Runs a benchmark's cases one after another and keeps the results file up to date."""

import argparse
from collections.abc import Callable, Mapping, Sequence

import report
import timing
import torch
from throughput import failure
from tqdm import tqdm


def run(
    args: argparse.Namespace,
    settings: str,
    cases: Sequence[tuple],
    run_case: Callable[..., list[dict]],
    summarise: Callable[[list[dict]], None],
    table: Callable[[list[dict]], str],
) -> list[dict]:
    """The rows of run_case(*case, args, progress) for every case; prints their table.

    After each case all rows so far go to args.json, if it is given. A case has args.rounds rounds of progress. Ctrl-C
    ends it with the table of the finished cases.
    """
    facts = report.environment(torch.device(args.device)) | {"settings": settings}
    print(report.facts_list(facts), end="\n\n", flush=True)
    rows = []
    bar = dict(total=len(cases) * args.rounds, unit="round", disable=None, leave=False)
    with report.showing(lambda: print(table(rows))), tqdm(**bar) as progress:
        for done, case in enumerate(cases, 1):
            rows += run_case(*case, args, progress)
            progress.update(done * args.rounds - progress.n)
            summarise(rows)
            if args.json:
                known = facts | report.incomplete(done, len(cases))
                text = f"{report.facts_list(known)}\n\n{table(rows)}"
                report.write_results(args.json, dict(environment=known, rows=rows), text)
    return rows


def time_rows(
    rows: Mapping[str, dict],
    functions: Mapping[str, Callable[[], object]],
    args: argparse.Namespace,
    progress: tqdm,
) -> None:
    """Times the functions in args.rounds rounds, each in turn, into the rows of their names."""
    try:
        seconds = timing.measure(functions, args.rounds, timing.clock_for(torch.device(args.device)), progress.update)
    except Exception as error:
        for name in functions:
            rows[name].update(failure(error))
        return
    for name, samples in seconds.items():
        rows[name].update(status="timed", seconds=samples)


def filled_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """report.table without the columns that are empty in every line; all of them where there is no line."""
    columns = range(len(header))
    filled = [column for column in columns if any(line[column] for line in lines)] or columns
    return report.table([header[column] for column in filled], [[line[column] for column in filled] for line in lines])
