"""Writes golden_llama.npz: a tiny random Llama and what transformers computes with it, from the norm up to the logits.

Run once by hand, in an environment with torch and transformers: `python tests/cascade/make_golden.py`. Make it anew
only where the file's contents change, never to turn a red test green: these numbers are the reference.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

TIME = 11
SETTINGS = {
    "vocab_size": 61,
    "hidden_size": 24,  # not num_attention_heads * head_dim
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-3,  # large enough to be seen
    "tie_word_embeddings": True,
}


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SETTINGS)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the symmetric start: scales that differ, large weights
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (1.0 if parameter.ndim == 1 else 0.0))
    ids = torch.randint(0, SETTINGS["vocab_size"], (2, TIME))
    decoder, layer, head_dim = model.model, model.model.layers[0], SETTINGS["head_dim"]
    golden: dict[str, torch.Tensor] = {"ids": ids}
    residuals = []

    def record(name: str, module: torch.nn.Module) -> None:
        def keep(_module: torch.nn.Module, _inputs: object, output: torch.Tensor | tuple) -> None:
            golden[name] = output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(keep)

    for name, module in {"norm": layer.input_layernorm, "attention": layer.self_attn, "mlp": layer.mlp}.items():
        record(name, module)
    record("query", layer.self_attn.q_proj)
    record("last", decoder.norm)
    for block in decoder.layers:
        block.register_forward_hook(lambda _module, _inputs, output: residuals.append(output))
    with torch.no_grad():
        golden["logits"] = model(ids).logits
        golden["residuals"] = torch.stack([decoder.embed_tokens(ids), *residuals])  # after 0, 1, ... layers
        cosine, sine = decoder.rotary_emb(golden["norm"], torch.arange(TIME)[None])
        heads = golden["query"].reshape(2, TIME, -1, head_dim).transpose(1, 2)
        golden["rotated"] = apply_rotary_pos_emb(heads, heads, cosine, sine)[0].transpose(1, 2)
    golden |= {"cosine": cosine[0, :, : head_dim // 2], "sine": sine[0, :, : head_dim // 2]}
    for name, values in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            golden[f"weights/{name}"] = values
    arrays = {name: values.numpy() for name, values in golden.items()}
    settings = {f"config/{name}": np.asarray(value) for name, value in SETTINGS.items()}
    np.savez_compressed(Path(__file__).with_name("golden_llama.npz"), **arrays, **settings)


if __name__ == "__main__":
    main()
