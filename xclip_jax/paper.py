"""The results that X-CLIP's paper reports (https://arxiv.org/abs/2207.07285), for comparison."""

from typing import Any

_METRICS = ("R@1", "R@5", "R@10", "MnR")
# Text to video, then video to text; the paper gives R@10 only for MSR-VTT.
_RESULTS = {
    ("msrvtt", "9k", "ViT-B/32"): ((46.1, 73.0, 83.1, 13.2), (46.8, 73.3, 84.0, 9.1)),
    ("msrvtt", "9k", "ViT-B/16"): ((49.3, 75.8, 84.8, 12.2), (48.9, 76.8, 84.5, 8.1)),
    ("msvd", "", "ViT-B/32"): ((47.1, 77.8, None, 9.5), (60.9, 87.8, None, 4.7)),
    ("msvd", "", "ViT-B/16"): ((50.4, 80.6, None, 8.4), (66.8, 90.4, None, 4.2)),
    ("lsmdc", "", "ViT-B/32"): ((23.3, 43.0, None, 56.0), (22.5, 42.2, None, 50.7)),
    ("lsmdc", "", "ViT-B/16"): ((26.1, 48.4, None, 46.7), (26.9, 46.2, None, 41.9)),
    ("didemo", "", "ViT-B/32"): ((45.2, 74.0, None, 14.6), (43.1, 72.2, None, 10.9)),
    ("didemo", "", "ViT-B/16"): ((47.8, 79.3, None, 12.6), (47.8, 76.8, None, 10.5)),
    ("activitynet", "val_1", "ViT-B/32"): ((44.3, 74.1, None, 7.9), (43.9, 73.9, None, 7.6)),
    ("activitynet", "val_1", "ViT-B/16"): ((46.2, 75.5, None, 6.8), (46.4, 75.9, None, 6.4)),
}


def paper_results(dataset: str, variant: str, vision: Any) -> dict[str, dict[str, Any]]:
    """Returns the paper's results, {backbone: {"text_to_video": metrics, "video_to_text": ...}}.

    The dict is empty for a data set (see xclip_jax.prepare) or variant that the paper does not use.
    It has both backbones if the image tower `vision` (patch_size, width) is neither of them.
    """
    reported = {key[2]: rows for key, rows in _RESULTS.items() if key[:2] == (dataset, variant)}
    results = {}
    for name in [backbone(vision)] if backbone(vision) in reported else reported:
        both = (dict(zip(_METRICS, row, strict=True)) for row in reported[name])
        results[name] = dict(zip(("text_to_video", "video_to_text"), both, strict=True))
    return results


def backbone(vision: Any) -> str:
    """Returns "ViT-B/32" or "ViT-B/16" as in the paper, or "" for another image tower."""
    return f"ViT-B/{vision.patch_size}" if vision.width == 768 else ""
