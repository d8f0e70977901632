"""Test of examples/quickstart.ipynb: its code runs with a small model of random weights.

The cells are plain Python and are executed here, as Jupyter would be 28 more packages to install.
"""

import json
from pathlib import Path

import checkpoints
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from preparing import one_thread

from xclip_jax import workers
from xclip_jax.data import rendered
from xclip_jax.data.text import learn_tokenizer

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples/quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def write_model(folder):
    """Writes a small CLIP with random weights as Hugging Face publishes it, returns `folder`."""
    texts = [caption for scene in rendered.draw_scenes("train", 60) for caption in scene.captions]
    tokenizer = learn_tokenizer(texts, max_words=24)
    sizes = {"side": 32, "patch": 16, "context": 24, "vocab": tokenizer.vocab_size}
    tensors = checkpoints.clip(sizes=checkpoints.TINY | sizes)
    checkpoints.write_hugging_face(folder, tensors)
    tokenizer.save(folder)
    return folder


def run_cells(settings):
    """Returns (variables after the last cell, figures that were shown)."""
    variables = {"__name__": "__main__"}
    for number, cell in enumerate(CODE):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), variables)
        if "parameters" in cell["metadata"].get("tags", []):
            assert settings.keys() <= variables.keys()
            variables |= settings
    return variables, [plt.figure(number) for number in plt.get_fignums()]


@pytest.fixture
def figures_stay_open(monkeypatch):
    mpl.use("Agg")
    monkeypatch.setattr(plt, "show", lambda: None)
    yield
    plt.close("all")


def test_notebook_is_stored_without_outputs():
    assert not any(cell["outputs"] or cell["execution_count"] for cell in CODE)


def test_notebook_ranks_explains_and_fine_tunes(tmp_path, monkeypatch, figures_stay_open):
    monkeypatch.setattr(workers, "worker_pool", one_thread)
    settings = {"MODEL": str(write_model(tmp_path / "clip")), "OUTPUT": tmp_path / "out"}
    settings |= {"TRAIN_CLIPS": 8, "EPOCHS": 30, "LEARNING_RATE": 1e-3}
    found, figures = run_cells(settings)
    assert found["sim_TxV"].shape == (16, 16)
    before, after = found["recalls"]["8 training clips"]
    assert after > before
    assert found["recalls"].keys() == {"8 training clips", "8 other clips"}
    _, first, second = figures
    for figure in (first, second):
        weights_WxF = figure.axes[1].images[0].get_array()
        np.testing.assert_allclose(weights_WxF.sum(), 100, rtol=1e-4)
        words = [label.get_text() for label in figure.axes[1].get_yticklabels()]
        assert "".join(words) == found["sentences"][0].replace(" ", "")
