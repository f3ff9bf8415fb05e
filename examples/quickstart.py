# python examples/quickstart.py [RECIPE]
"""From a model to a plot: calibrate once, load the checkpoint, turn its dial, and draw perplexity against bits.

Needs `pip install "mobiq-lightning[calibrate]"`. The cells run in a notebook as well; the built-in model makes it work offline.
"""

# %%
import sys

import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer

import mobiq_lightning

# %% Calibrate: a shipped recipe, its keys overridden as you like. Run again, it goes on or returns what is finished.
run = mobiq_lightning.fit(sys.argv[1] if len(sys.argv) > 1 else "tiny-ranges")

# %% Load, and read one text at several bits: the dial takes any number between the ends.
model = mobiq_lightning.load(run.path)
ids = AutoTokenizer.from_pretrained(run.checkpoint)("def mean(values):\n    return", return_tensors="pt")["input_ids"]
for bits in (2, 2.5, 3, 4, 6, 8):
    with torch.no_grad(), model.bits(bits):
        print(
            f"{bits} bits: loss {model(ids, labels=ids).loss:.3f}, used {model.bits_used().code_bits:.2f} bits per weight"
        )

# %% Draw what the run measured on its evaluation text.
rows = [row for row in run.results().measured.rows if row.allocation == "router"]
axes = (figure := Figure()).subplots()
axes.plot([row.used_bits for row in rows], [row.perplexity for row in rows], marker="o")
axes.set(xlabel="bits per weight", ylabel="perplexity")
figure.savefig(run.path / "quickstart.png")
print(f"{run.path / 'quickstart.png'} shows perplexity against bits")
