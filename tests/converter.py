"""A stand-in for llama.cpp's convert_hf_to_gguf.py: its command line, and a real GGUF file by the real writer.

``SAYS`` in the environment makes it fail as the real one does.
"""

import argparse
import json
import os
import sys
from pathlib import Path

OURS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
OURS |= {f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"} | {
    f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--outfile", type=Path)
    parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0"])
    options = parser.parse_args()
    if said := os.environ.get("SAYS"):
        sys.exit(said)
    import numpy as np
    from gguf import GGUFWriter
    from safetensors.torch import load_file

    config = json.loads((options.model / "config.json").read_text())
    settings = json.loads((options.model / "tokenizer_config.json").read_text())
    vocabulary = json.loads((options.model / "tokenizer.json").read_text())["model"]["vocab"]
    writer = GGUFWriter(options.outfile, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_token_list(tokens[: -1 if os.environ.get("LOSES_A_TOKEN") else None])
    writer.add_chat_template((options.model / "chat_template.jinja").read_text())
    if "add_bos_token" in settings:
        # The real one has its own opinion at times.
        writer.add_add_bos_token(not settings["add_bos_token"])
    for name, weight in load_file(options.model / "model.safetensors").items():
        writer.add_tensor(_name(name), weight.float().numpy().astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, number, rest = name.split(".", 3)
        return f"blk.{number}.{OURS[rest.removesuffix('.weight')]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(
        name, "output.weight"
    )


if __name__ == "__main__":
    main()
