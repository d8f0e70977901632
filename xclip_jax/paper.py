"""What X-CLIP's paper reports (https://arxiv.org/abs/2207.07285), to print beside ours.

None of these numbers is ours.
"""

_METRICS = ("R@1", "R@5", "R@10", "MnR")
# Text to video, then video to text; R@10 is given for MSR-VTT alone.
_RESULTS = {
    ("msrvtt", "9k"): {
        "ViT-B/32": ((46.1, 73.0, 83.1, 13.2), (46.8, 73.3, 84.0, 9.1)),
        "ViT-B/16": ((49.3, 75.8, 84.8, 12.2), (48.9, 76.8, 84.5, 8.1)),
    },
    ("msvd", ""): {
        "ViT-B/32": ((47.1, 77.8, None, 9.5), (60.9, 87.8, None, 4.7)),
        "ViT-B/16": ((50.4, 80.6, None, 8.4), (66.8, 90.4, None, 4.2)),
    },
    ("lsmdc", ""): {
        "ViT-B/32": ((23.3, 43.0, None, 56.0), (22.5, 42.2, None, 50.7)),
        "ViT-B/16": ((26.1, 48.4, None, 46.7), (26.9, 46.2, None, 41.9)),
    },
    ("didemo", ""): {
        "ViT-B/32": ((45.2, 74.0, None, 14.6), (43.1, 72.2, None, 10.9)),
        "ViT-B/16": ((47.8, 79.3, None, 12.6), (47.8, 76.8, None, 10.5)),
    },
    ("activitynet", "val_1"): {
        "ViT-B/32": ((44.3, 74.1, None, 7.9), (43.9, 73.9, None, 7.6)),
        "ViT-B/16": ((46.2, 75.5, None, 6.8), (46.4, 75.9, None, 6.4)),
    },
}


def paper_results(dataset, variant, vision):
    """{backbone: {"text_to_video": metrics, "video_to_text": metrics}}, as in results.json.

    Args:
        dataset, variant: of xclip_jax.prepare; what the paper does not report gives {}.
        vision: of the image tower, with patch_size and width; the rows of both backbones are given
            for one that is neither.
    """
    rows = _RESULTS.get((dataset, variant), {})
    own = backbone(vision)
    chosen = {own: rows[own]} if own in rows else rows
    return {backbone: _named(pair) for backbone, pair in chosen.items()}


def backbone(vision):
    """ "ViT-B/32" or "ViT-B/16", as the paper calls them; "" for another image tower."""
    return f"ViT-B/{vision.patch_size}" if vision.width == 768 else ""


def _named(pair):
    named = [dict(zip(_METRICS, values, strict=True)) for values in pair]
    return dict(zip(("text_to_video", "video_to_text"), named, strict=True))
