"""Writes golden_adapter.npz: LoRA adapters as `peft` saves them, and what it computes with them on the golden Llama.

Run once by hand, in an environment with torch, transformers and peft: `python tests/smollm/make_golden_adapter.py`.
Make it anew only where the file's contents change, never to turn a red test green: these numbers are the reference.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parent
RANK, ALPHA = 4, 8
KERNELS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def golden_llama(arrays: dict[str, np.ndarray]) -> LlamaForCausalLM:
    settings = {name.removeprefix("config/"): arrays[name].item() for name in arrays if name.startswith("config/")}
    model = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    weights = {
        name: torch.from_numpy(arrays[f"weights/{name}"]) for name in model.state_dict() if "lm_head" not in name
    }
    model.load_state_dict(weights, strict=False)
    return model


def main() -> None:
    torch.manual_seed(1)
    with np.load(FOLDER / "golden_llama.npz") as file:
        arrays = dict(file)
    ids, golden = torch.from_numpy(arrays["ids"]), {}
    for name, layers in (("all", None), ("last", [1, 2])):
        pattern = None if layers is None else "layers"
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=KERNELS, layers_to_transform=layers,
            layers_pattern=pattern,
        )  # fmt: skip
        model = peft.get_peft_model(golden_llama(arrays), config).eval()
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name:
                    parameter.copy_(torch.randn_like(parameter) * 0.2)
            golden[f"{name}/logits"] = model(ids).logits.numpy()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            tensors = load_file(Path(folder, "adapter_model.safetensors"))
            settings = json.loads(Path(folder, "adapter_config.json").read_text())
        golden |= {f"{name}/tensors/{tensor}": values.numpy() for tensor, values in tensors.items()}
        settings["target_modules"].sort()  # a set
        golden[f"{name}/config"] = np.asarray(json.dumps(settings))
    np.savez_compressed(FOLDER / "golden_adapter.npz", **golden)


if __name__ == "__main__":
    main()
