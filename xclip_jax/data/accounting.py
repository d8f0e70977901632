"""What is odd or missing when a data set is prepared: counted, printed, listed, bounded."""

import collections
import dataclasses
import json

from xclip_jax.cli import InputError
from xclip_jax.data.datasets.listing import Finding


def report_findings(output, title, listing, paths, files):
    """Writes findings.jsonl; prints what was expected and found, and counts of what is odd.

    Args:
        title: of the table.
        paths: for each clip of the listing its file, or None.
        files: all video files there are.
    """
    here = zip(listing.clips, paths, strict=True)
    absent = [Finding("id without a file", clip.video, clip.split) for clip, p in here if not p]
    used = set(paths)
    unused = [Finding("file that no clip uses", str(p)) for p in files if p not in used]
    findings = [*listing.findings, *absent, *unused]
    lines = (json.dumps(dataclasses.asdict(finding), ensure_ascii=False) for finding in findings)
    path = output / "findings.jsonl"
    text = "".join(line + "\n" for line in lines)
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    if listing.expected:
        print(f"{title:20}{'expected':>10}{'found':>10}{'missing':>10}")
    counts = listing.counts() - collections.Counter(finding.detail for finding in absent)
    for split, expected in listing.expected.items():
        missing = expected - counts[split]
        line = f"  {split:18}{expected:10,}{counts[split]:10,}{max(0, missing):10,}"
        print(line + (f"  {-missing:,} too many: is it the right list?" if missing < 0 else ""))
    kinds = collections.Counter(finding.what for finding in findings)
    for what, count in kinds.items():
        print(f"  {count:,} x {what}")
    if kinds:
        print(f"  listed in {path}")


def report_failures(output, listing, outcomes, max_failures):
    """Writes failures.jsonl, prints the counts; InputError if too many clips failed."""
    clips = listing.clips
    entries = [
        {"id": clip.id, "reason": outcome.failure or outcome.note, "kept": not outcome.failure}
        for clip, outcome in zip(clips, outcomes, strict=True)
        if outcome.failure or outcome.note
    ]
    entries += [{"id": lost.id, "reason": lost.what, "kept": False} for lost in listing.lost]
    path = output / "failures.jsonl"
    lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    path.write_text("".join(lines), encoding="utf-8")
    failed = [entry for entry in entries if not entry["kept"]]
    total, partly = len(clips) + len(listing.lost), len(entries) - len(failed)
    print(
        f"{total - len(failed)} of {total} clips read"
        + (f", {partly} of them only in part" if partly else "")
        + (f"; {len(failed)} failed" if failed else "")
        + (f" (listed in {path})" if entries else "")
    )
    if len(failed) / total > max_failures or len(failed) == total:
        what = f"{len(failed)} of {total} clips failed"
        if len(failed) < total:
            what += f", more than --max_failures={max_failures:g} allows"
        what += f"; the first is {failed[0]['id']}: {failed[0]['reason']}"
        raise InputError(f"{what}; all are in {path}")
    _check_splits(listing, outcomes, max_failures, path)


def _check_splits(listing, outcomes, max_failures, path):
    """A small split must not go lost in the failures allowed for a large one."""
    total, failed = listing.counts(), collections.Counter()
    for clip, outcome in zip(listing.clips, outcomes, strict=True):
        failed[clip.split] += outcome.failure is not None
    for lost in listing.lost:
        total[lost.detail] += 1
        failed[lost.detail] += 1
    for split, count in failed.items():
        if count / total[split] > max_failures:
            raise InputError(
                f"{count} of {total[split]} {split} clips failed, more than "
                f"--max_failures={max_failures:g} allows; all are in {path}"
            )
