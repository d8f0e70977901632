"""Batch size of the contrastive loss, with the memory of the smallest batch.

    python -m xclip_jax.study --study=configs/studies/batch_size.py --config=configs/msrvtt.py
    python -m xclip_jax.study --study=configs/studies/batch_size.py:75,150,300,600 --config=...

Default: 1/4, 1/2, 1 and 2 times the config's batch size. All runs see the same number of pairs at
the same learning rate, so a batch twice as large takes half the steps.
"""

from xclip_jax.study import Study, Variant


def get_study(config, sizes=""):
    """Returns the study of `sizes`, comma-separated numbers of pairs per batch.

    The micro-batch is the config's if that is a number, or the smallest of the sizes.
    """
    default = config.train.batch_size
    numbers = [int(size) for size in sizes.split(",") if size]
    numbers = numbers or [default // 4, default // 2, default, 2 * default]
    configured = config.train.micro_batch
    micro_batch = min(numbers) if configured in (None, 0, "auto") else configured
    return Study(
        title="Batch size, with gradient caching",
        columns=("pairs per batch",),
        variants={
            f"{size}": Variant({"train.batch_size": size, "train.micro_batch": micro_batch})
            for size in numbers
        },
        reference=f"{default}" if default in numbers else "",
        note=f"Micro-batches of {micro_batch} pairs; all runs see the same number of pairs.",
    )
