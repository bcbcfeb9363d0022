"""Peak memory of loading a compressed model, in a process of its own, written as CSV.

    python benchmarks/load_memory.py [results/load_memory.csv]

A Llama of random weights is converted and saved. A process imports all that is needed, notes its peak resident
memory (files that are mapped included), loads the model, and notes it again.
"""

import csv
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "load_memory.csv"
MAKE = """
import sys, torch, transformers
import einlinear as el
config = transformers.LlamaConfig(
    vocab_size=8000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=8
)
model = transformers.LlamaForCausalLM(config)
print(4 * sum(p.numel() for p in model.parameters()))
el.convert(model, "btt(rank=6)", weights="init")
model.save_pretrained(sys.argv[1])
"""
LOAD = """
import resource, sys, torch, transformers
import einlinear as el
import transformers.models.llama.modeling_llama, einlinear.hf.models
torch.randn(64, 64) @ torch.randn(64, 64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
total = sum(float(p.detach().sum()) for p in model.parameters())  # every page is read
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def run(code: str, folder: str) -> int:
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main(path: Path = RESULTS) -> None:
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        dense = run(MAKE, folder)
        size = (Path(folder) / "model.safetensors").stat().st_size
        peak = run(LOAD, folder)
    row = {
        "model": "Llama, width 1024, 6 layers", "dense_MB": dense / 1e6, "compressed_MB": size / 1e6,
        "peak_MB": peak / 1e6, "peak_over_compressed": peak / size, "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}
    print(shown)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, shown.keys())
        writer.writeheader()
        writer.writerow(shown)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
