"""Test of the order in which training dispatches steps, copies batches and waits for results."""

import tiny

from xclip_jax import sharding, train


class Metric:
    """A number that notes when it is read."""

    def __init__(self, events, step):
        self.events, self.step = events, step

    def __float__(self):
        self.events.append(("wait", self.step))
        return 0.5


def test_the_next_batch_is_copied_before_the_loop_waits_for_the_last_step(tmp_path, monkeypatch):
    events, compile_training, shard_batch = [], train.compile_training, sharding.shard_batch

    def compile_noted(*arguments):
        init, step = compile_training(*arguments)

        def noted(state, batch):
            number = len([1 for name, _ in events if name == "step"]) + 1
            events.append(("step", number))
            state, metrics = step(state, batch)
            return state, metrics | {"gradient_norm": Metric(events, number)}

        return init, noted

    def shard_noted(batch, mesh):
        number = len([1 for name, _ in events if name == "copy"]) + 1
        events.append(("copy", number))
        return shard_batch(batch, mesh)

    monkeypatch.setattr(train, "compile_training", compile_noted)
    monkeypatch.setattr(sharding, "shard_batch", shard_noted)
    data = tiny.make_dataset(tmp_path / "data")
    config = tiny.make_config(data, epochs=2, select="last", eval_every=100, micro_batch=0)
    config.model.remat = "none"  # with "auto" the step is compiled in advance
    train.train(config, tmp_path / "run")
    expected = [("copy", 1), ("step", 1), ("copy", 2)]
    for step in range(2, 7):
        expected += [("step", step), ("copy", step + 1), ("wait", step - 1)]
    expected.remove(("copy", 7))  # there are six steps
    assert events == [*expected, ("wait", 6)]
