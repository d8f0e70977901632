"""Annotation readers: released or own files -> one `Listing` of clips, whatever the benchmark.

A reader is one function, strict about what it is given; finding the videos, reading frames and
writing the data set are the same for all.
"""

from xclip_jax.data.datasets import activitynet, captions, didemo, lsmdc, msrvtt, msvd

# Each has `read(annotations)`, or `read(annotations, variant)` where there are VARIANTS (the values
# of prepare's --split; the first is the default), and DOWNLOAD: what to get, and where.
DATASETS = {
    "captions": captions,
    "msrvtt": msrvtt,
    "msvd": msvd,
    "lsmdc": lsmdc,
    "didemo": didemo,
    "activitynet": activitynet,
}
