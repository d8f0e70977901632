"""The metric table: names, cells, and the whole as aligned plain text."""

METRICS = ("R@1", "R@5", "R@10", "MdR", "MnR")
DIRECTIONS = (("text_to_video", "text to video"), ("video_to_text", "video to text"))


def format_table(results):
    """The metrics of `results` (see results.json) as an aligned plain-text table."""
    lines = [", ".join(facts(results))]
    if results.get("note"):
        lines.append(f"note: {results['note']}")
    rows = table_rows(results)
    width = max(len(label) for label, _, _ in rows)
    lines.append(" " * width + "".join(f"{name:>8}" for name in METRICS))
    for label, metrics, _ in rows:
        lines.append(f"{label:{width}}" + "".join(f"{cell:>8}" for cell in cells(metrics)))
    return "\n".join(lines)


def facts(results):
    """What the numbers are of, as short texts."""
    texts, videos = count(results["num_texts"], "text"), count(results["num_videos"], "video")
    surplus = results["num_videos"] - results["expected_videos"]
    chosen = {None: "", "last step": " (the last)"}
    chosen = chosen.get(results["selected_on"], f" (chosen on {results['selected_on']})")
    return [
        *([results["dataset"]] if results["dataset"] != "captions" else []),
        f"{results['split']} split",
        f"step {results['step']}{chosen}",
        results["protocol"],
        *([f"up to second {results['max_seconds']:g}"] if results["max_seconds"] else []),
        texts,
        videos,
        f"{-surplus:,} missing" if surplus <= 0 else f"{surplus:,} more than expected",
    ]


def table_rows(results):
    """[(label, metrics, kind)]: each way ours, with test-time options, and the paper's.

    kind is "ours", "option" or "paper".
    """
    rows = []
    for key, name in DIRECTIONS:
        rows.append((name, results[key], "ours"))
        for option, both in results.get("normalized", {}).items():
            if key in both:
                rows.append((f"  with {option}", both[key], "option"))
        for backbone, both in results.get("paper", {}).items():
            rows.append((f"  paper, {backbone}", both[key], "paper"))
    return rows


def cells(metrics):
    """One direction's metrics as text, in the order of METRICS; - where there is none."""
    return ["-" if metrics.get(name) is None else f"{metrics[name]:.1f}" for name in METRICS]


def count(number, noun):
    """1 video, 2,000 videos."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
