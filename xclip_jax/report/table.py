"""The metric table: names, cells, and the whole as aligned plain text."""

METRICS = ("R@1", "R@5", "R@10", "MdR", "MnR")
DIRECTIONS = (("text_to_video", "text to video"), ("video_to_text", "video to text"))


def format_table(results):
    """The metrics of `results` (see results.json) as an aligned plain-text table."""
    lines = [
        f"{results['split']} split, step {results['step']}: "
        f"{count(results['num_texts'], 'text')}, {count(results['num_videos'], 'video')}"
    ]
    if results.get("note"):
        lines.append(f"note: {results['note']}")
    lines.append(" " * 13 + "".join(f"{name:>8}" for name in METRICS))
    for key, name in DIRECTIONS:
        lines.append(f"{name:13}" + "".join(f"{cell:>8}" for cell in cells(results[key])))
    return "\n".join(lines)


def cells(metrics):
    """One direction's metrics as text, in the order of METRICS; - where there is none."""
    return ["-" if metrics.get(name) is None else f"{metrics[name]:.1f}" for name in METRICS]


def count(number, noun):
    """1 video, 2,000 videos."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
