"""What each other tool is given for the same DPO task, and how its log is read (others.py runs it)."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from preference_tuning.config import DPOConfig, LoraConfig

LORA = LoraConfig()
"""Rank and alpha 32, no dropout, on all seven projections."""
MAX_LENGTH = 512


@dataclass
class Measured:
    """What a side logged: seconds of all optimizer steps, reference pass included, and values of each step."""

    seconds: float
    losses: list[float]
    chosen_logps: list[float]
    peak_mb: int
    versions: dict[str, str]


@dataclass
class Task:
    """What both sides do."""

    folder: Path
    model: Path
    pairs: list[dict[str, str]]
    dpo: DPOConfig
    threads: int


def llama_factory(task: Task, folder: Path, python: Path) -> Measured:
    """Run LLaMA-Factory; its ``train_runtime`` holds the reference pass, which it does anew in every step."""
    (folder / "pairs.json").write_text(json.dumps(task.pairs), encoding="utf-8")
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    info = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    settings = {
        "model_name_or_path": str(task.model), "template": "chatml", "cutoff_len": MAX_LENGTH,
        "stage": "dpo", "do_train": True, "pref_loss": "sigmoid", "pref_beta": task.dpo.beta,
        "finetuning_type": "lora", "lora_rank": LORA.rank, "lora_alpha": int(LORA.alpha), "lora_dropout": LORA.dropout,
        "lora_target": ",".join(LORA.target_modules),
        "dataset": "pairs", "dataset_dir": str(folder), "preprocessing_num_workers": 1,
        "output_dir": str(folder / "out"), "save_strategy": "no", "report_to": "none", "logging_steps": 1,
        "num_train_epochs": 1, "learning_rate": task.dpo.learning_rate, "weight_decay": task.dpo.weight_decay,
        "lr_scheduler_type": "linear", "warmup_steps": 0, "max_grad_norm": task.dpo.max_grad_norm,
        "per_device_train_batch_size": task.dpo.per_device_train_batch_size,
        "gradient_accumulation_steps": task.dpo.gradient_accumulation_steps,
        "bf16": False, "fp16": False, "use_cpu": True, "disable_gradient_checkpointing": True, "seed": task.dpo.seed,
    }  # fmt: skip
    (folder / "dpo.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    _, peak = run([str(python.parent / "llamafactory-cli"), "train", str(folder / "dpo.yaml")], folder, task.threads)
    seconds = json.loads((folder / "out" / "train_results.json").read_text(encoding="utf-8"))["train_runtime"]
    history = json.loads((folder / "out" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    steps = [line for line in history if "loss" in line]
    packages = ("llamafactory", "torch", "transformers", "trl", "peft")
    return Measured(
        seconds, [s["loss"] for s in steps], [s["logps/chosen"] for s in steps], peak, versions(python, packages)
    )


def torchtune(task: Task, folder: Path, python: Path) -> Measured:
    """Run torchtune; it reports no seconds of the loop, so its log lines are stamped as they come.

    The reference pass is in each step. The recipe neither clips gradients nor, as configured, changes the rate.
    """
    chats = [
        {
            side: [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
            for side in ("chosen", "rejected")
        }
        for pair in task.pairs
    ]
    (folder / "pairs.json").write_text(json.dumps(chats), encoding="utf-8")
    (folder / "torchtune.yaml").write_text(yaml.safe_dump(_torchtune_config(task, folder)), encoding="utf-8")
    command = ["run", "lora_dpo_single_device", "--config", str(folder / "torchtune.yaml")]
    lines, peak = run([str(python.parent / "tune"), *command], folder, task.threads)
    steps = [(at, line) for at, line in lines if re.search(r"Step \d+ \|", line)]
    # The line before the loop begins; without it the log is not one that this knows how to read.
    begin = next(at for at, line in lines if "No learning rate scheduler configured" in line)
    values = {name: [_value(line, name) for _, line in steps] for name in ("loss", "log_probs/chosen")}
    packages = ("torchtune", "torchao", "torch")
    return Measured(steps[-1][0] - begin, values["loss"], values["log_probs/chosen"], peak, versions(python, packages))


def _torchtune_config(task: Task, folder: Path) -> dict[str, Any]:
    model = json.loads((task.model / "config.json").read_text(encoding="utf-8"))
    tokenizer = json.loads((task.model / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    # SmolLM2's tokenizer is a byte-level BPE with single digits and ChatML tokens: that of Qwen2 with other tables.
    (folder / "vocab.json").write_text(json.dumps(tokenizer["vocab"]), encoding="utf-8")
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in tokenizer["merges"]]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    return {
        "output_dir": str(folder / "out"),
        "model": {
            # Llama 3.2's builder: tied embeddings; a scale factor of 1 is plain RoPE.
            "_component_": "torchtune.models.llama3_2.lora_llama3_2", "scale_factor": 1,
            "vocab_size": model["vocab_size"], "num_layers": model["num_hidden_layers"],
            "num_heads": model["num_attention_heads"], "num_kv_heads": model["num_key_value_heads"],
            "embed_dim": model["hidden_size"], "intermediate_dim": model["intermediate_size"],
            "max_seq_len": MAX_LENGTH, "norm_eps": model["rms_norm_eps"],
            "rope_base": int(model["rope_parameters"]["rope_theta"]),
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True,
            "apply_lora_to_output": False, "lora_rank": LORA.rank, "lora_alpha": LORA.alpha,
            "lora_dropout": LORA.dropout,
        },
        "tokenizer": {
            "_component_": "torchtune.models.qwen2.Qwen2Tokenizer", "path": str(folder / "vocab.json"),
            # No max_seq_len: with it torchtune 0.6.1 leaves the end of each answer out of the loss.
            "merges_file": str(folder / "merges.txt"),
            "special_tokens": {token: tokenizer["vocab"][token] for token in special},
        },
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(task.model),
            "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None, "output_dir": str(folder / "out"),
            "model_type": "LLAMA3_2",
        },
        "resume_from_checkpoint": False, "save_adapter_weights_only": True,
        "dataset": {
            "_component_": "torchtune.datasets.preference_dataset", "source": "json", "split": "train",
            "data_files": str(folder / "pairs.json"),
        },
        "seed": task.dpo.seed, "shuffle": True, "batch_size": task.dpo.per_device_train_batch_size,
        "optimizer": {
            "_component_": "torch.optim.AdamW", "fused": True, "weight_decay": task.dpo.weight_decay,
            "lr": task.dpo.learning_rate,
        },
        "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": task.dpo.beta},
        "epochs": 1, "max_steps_per_epoch": None,
        "gradient_accumulation_steps": task.dpo.gradient_accumulation_steps, "compile": False,
        "metric_logger": {"_component_": "torchtune.training.metric_logging.StdoutLogger"},
        "log_every_n_steps": 1, "log_peak_memory_stats": False, "device": "cpu", "dtype": "fp32",
        "enable_activation_checkpointing": False, "enable_activation_offloading": False,
    }  # fmt: skip


def _value(line: str, name: str) -> float:
    found = re.search(rf"(?:^|\s){re.escape(name)}:(?:tensor\()?([-\d.e]+)", line)
    assert found, f"no {name} in: {line}"
    return float(found[1])


def ms_swift(task: Task, folder: Path, python: Path) -> Measured:
    """Run ms-swift; its ``train_runtime`` holds the reference pass, which it does anew in every step."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": pair["prompt"]},
                {"role": "assistant", "content": pair["chosen"]},
            ],
            "rejected_response": pair["rejected"],
        }
        for pair in task.pairs
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings = {
        "rlhf_type": "dpo", "model": task.model, "model_type": "llama", "template": "chatml", "system": "",
        "max_length": MAX_LENGTH, "beta": task.dpo.beta, "loss_type": "sigmoid",
        "tuner_type": "lora", "lora_rank": LORA.rank, "lora_alpha": int(LORA.alpha), "lora_dropout": LORA.dropout,
        "dataset": folder / "pairs.jsonl", "split_dataset_ratio": 0, "dataset_num_proc": 1,
        "output_dir": folder / "out", "add_version": False, "save_strategy": "no", "eval_strategy": "no",
        "report_to": "none", "logging_steps": 1, "num_train_epochs": 1, "learning_rate": task.dpo.learning_rate,
        "weight_decay": task.dpo.weight_decay, "lr_scheduler_type": "linear", "warmup_steps": 0,
        "max_grad_norm": task.dpo.max_grad_norm, "optim": "adamw_torch_fused",
        "per_device_train_batch_size": task.dpo.per_device_train_batch_size,
        "gradient_accumulation_steps": task.dpo.gradient_accumulation_steps,
        "torch_dtype": "float32", "bf16": False, "fp16": False, "use_cpu": True, "gradient_checkpointing": False,
        "attn_impl": "sdpa", "dataloader_num_workers": 0, "seed": task.dpo.seed, "use_hf": True,
    }  # fmt: skip
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    flags += ["--target_modules", *LORA.target_modules]
    _, peak = run([str(python.parent / "swift"), "rlhf", *flags], folder, task.threads)
    log = (folder / "out" / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in log]
    steps = [entry for entry in entries if "loss" in entry]
    seconds = next(entry["train_runtime"] for entry in entries if "train_runtime" in entry)
    packages = ("ms-swift", "torch", "transformers", "trl", "peft")
    return Measured(
        seconds, [s["loss"] for s in steps], [s["logps/chosen"] for s in steps], peak, versions(python, packages)
    )


TOOLS: dict[str, Callable[[Task, Path, Path], Measured]] = {
    "llama-factory": llama_factory,
    "ms-swift": ms_swift,
    "torchtune": torchtune,
}


def run(command: list[str], folder: Path, threads: int) -> tuple[list[tuple[float, str]], int]:
    """Run a tool to its end; return its lines, each with the second it came, and its peak memory in MB."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "PYTHONUNBUFFERED": "1", "DO_NOT_TRACK": "1"}
    environment = {**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)}
    environment.pop("PYTHONPATH", None)
    child = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert child.stdout
    lines = [(time.perf_counter(), line.rstrip()) for line in child.stdout]
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit("\n".join(line for _, line in lines[-30:]) + f"\n{command[0]} failed")
    return lines, usage.ru_maxrss // 1024


def versions(python: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of packages in an environment."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    found: dict[str, str] = json.loads(subprocess.check_output([str(python), "-c", code, *packages], text=True))
    return found
