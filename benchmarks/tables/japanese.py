"""The tables of the Japanese pages: the same figures, with their words in Japanese. `ja NAME` is the table NAME.

Every heading of a column needs its Japanese here; a cell that has none, figures above all, stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial

HEADINGS = {
    "config": "設定",
    "parameters": "パラメータ数",
    "published val PPL": "公表された検証PPL",
    "ours, val PPL (3 seeds)": "本実装の検証PPL(3シード)",
    "ours, test PPL": "本実装のテストPPL",
    "ours": "本実装",
    "published, 0.6": "公表値、0.6",
    "published, 0.9": "公表値、0.9",
    "ours, 0.6": "本実装、0.6",
    "ours, 0.9": "本実装、0.9",
    "epochs": "エポック数",
    "an epoch": "1エポック",
    "memory": "メモリ",
    "recipe": "レシピ",
    "val PPL (3 seeds)": "検証PPL(3シード)",
    "test PPL": "テストPPL",
    "best epochs": "最良エポック",
    "all seeds took": "全シードの所要時間",
    "model": "モデル",
    "trained parameters": "学習パラメータ数",
    "cost of a token": "1トークンのコスト",
    "test PPL (by seed)": "テストPPL(シード別)",
    "95 % interval of the first": "最初のシードの95%区間",
    "loss on WikiText-2": "WikiText-2での損失",
    "work": "処理",
    "precision of both": "両者の精度",
    "newllm_jax": "newllm_jax",
    "PyTorch eager": "PyTorch eager",
    "PyTorch CUDA graph": "PyTorch CUDA graph",
    "newllm_jax in bf16": "newllm_jax(bf16)",
    "bf16 against PyTorch in tf32: eager, graph": "bf16とPyTorch tf32の比: eager, graph",
    "variant": "条件",
    "what": "量",
    **{f"epoch {number}": f"エポック{number}" for number in (0, 1, 2, 5, 10, 15, 16, 17, 20, 30, 40, 50)},
    "peer": "比較モデル",
    "settings tried": "試した設定数",
    "val PPL (seeds)": "検証PPL",
    "test PPL (seeds)": "テストPPL",
    "exit": "出口",
    "tokens": "トークン数",
    "base's loss on them": "ベースの損失",
    "loss at their exit": "出口での損失",
    "difference": "差",
    "": "",
    "criterion": "基準",
    "rank correlation with the loss": "損失との順位相関",
    "with the gain": "利得との順位相関",
    "PPL of the hard 60%": "難しい60%のPPL",
    "of the others": "残りのPPL",
    "cost, passes of the base": "コスト(ベースの順伝播を1とする)",
    "batch": "バッチ",
    "length": "長さ",
    "an update, ms": "1更新(ms)",
    "per token, us": "1トークン(us)",
    "tokens/s": "トークン/秒",
    "memory, MiB": "メモリ(MiB)",
}
CELLS = {
    "base alone, frozen": "ベースのみ(凍結)",
    "base alone": "ベースのみ",
    "base": "ベース",
    "Base+1, hard ratio 0.6": "ベース+1ステージ、hard ratio 0.6",
    "Base+5, hard ratio 0.6": "ベース+5ステージ、hard ratio 0.6",
    "Base+1, hard ratio 0.9": "ベース+1ステージ、hard ratio 0.9",
    "Base+5, hard ratio 0.9": "ベース+5ステージ、hard ratio 0.9",
    "base fine-tuned, lr 0.0001, epoch 1": "ベースのファインチューニング、学習率0.0001、1エポック目",
    "base fine-tuned, lr 1e-05, epoch 5": "ベースのファインチューニング、学習率1e-05、5エポック目",
    **{f"stage {number}": f"ステージ{number}" for number in range(1, 6)},
    "full fine-tuning": "全パラメータのファインチューニング",
    "LoRA on the base (`finetune --config lora`)": "ベースへのLoRA(`finetune --config lora`)",
    "**CASCADE `plus`**: re-entry at layer 8, LoRA": "**CASCADE `plus`**: 第8層へ再入、LoRA",
    "**CASCADE `cheaper`**: layers 14 to 17 skipped, short head": "**CASCADE `cheaper`**: 第14〜17層を省略、短い出力層",
    "fine-tuning of the last 8 layers": "最後の8層のファインチューニング",
    "depth pruning: 6 layers out, LoRA (`--config pruned`)": "深さの枝刈り: 6層を除去、LoRA(`--config pruned`)",
    "layers 14 to 19 skipped, whole head (all tokens easy)": "第14〜19層を省略、通常の出力層(全トークンが易しい側)",
    "early exit after layer 24 (all tokens easy)": "第24層の後で早期終了(全トークンが易しい側)",
    "CASCADE as published, hard ratio 0.9, stages: 1": "公表どおりのCASCADE、hard ratio 0.9、1ステージ",
    "CASCADE as published, hard ratio 0.6, stages: 5": "公表どおりのCASCADE、hard ratio 0.6、5ステージ",
    "`advanced`, an epoch": "`advanced`、1エポック",
    "`baseline`, an epoch": "`baseline`、1エポック",
    "CASCADE stage 1 at 0.6, an epoch": "CASCADE第1ステージ(0.6)、1エポック",
    "CASCADE, the base over 128,000 tokens": "CASCADE、ベースで128,000トークン",
    "`advanced`, published": "`advanced`、公表値",
    "`advanced`, ours": "`advanced`、本実装",
    "`baseline_plus`, ours": "`baseline_plus`、本実装",
    "`advanced_plus`, ours": "`advanced_plus`、本実装",
    "normal": "公表どおりの初期化",
    "signal, layer 12 / layer 1": "信号: 第12層 / 第1層",
    "gradient, layer 1 / layer 12": "勾配: 第1層 / 第12層",
    "val PPL": "検証PPL",
    "worse": "悪化",
    "of embedding and last hidden state": "埋め込みと最後の隠れ状態の角度",
    "of the prediction": "予測分布から",
    "trained to predict the gain, on 1,000 chunks": "利得を予測するよう1,000チャンクで学習",
    "the loss itself": "損失そのもの",
    "by chance": "無作為",
}


def japanese_tables(tables: Mapping[str, Callable[[], str]]) -> dict[str, Callable[[], str]]:
    """`ja NAME` for every table."""
    return {f"ja {name}": partial(in_japanese, table) for name, table in tables.items()}


def in_japanese(table: Callable[[], str]) -> str:
    """A table whose headings, and those cells that have Japanese, are in Japanese.

    Raises:
      KeyError: a heading has none.
    """
    header, rule, *rows = table().splitlines()
    translated = [_line(HEADINGS[cell] for cell in _cells(header)), _line("---" for _ in _cells(rule))]
    return "\n".join([*translated, *(_line(map(_translated, _cells(row))) for row in rows)])


def _translated(cell: str) -> str:
    return CELLS.get(cell) or re.sub(r"(?<=\d) to (?=\d)", "〜", cell)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split(" | ")]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
