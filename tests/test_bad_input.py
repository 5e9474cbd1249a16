"""Bad input, one line a case: what is broken, the command, its exit code and what it says. Nothing is ever lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
from bad_input import FINAL, World, call, edit, pickled, remove, sharded, truncate, weights, write

Case = tuple[str, Callable[[World], list[str]], int, str]
LINE = b'{"prompt": "a"}\n'
DEEP = "[" * 100_000
USER = {"role": "user", "content": "a"}
BOT = {"role": "assistant", "content": "b"}
NAN = float("nan")

PROMPTS: list[Case] = [
    ("missing file", lambda w: w.generate(w.d / "no.jsonl"), 1, "no such file"),
    ("wrong suffix", lambda w: w.generate(w.file("p.txt", "a")), 1, "should end in .parquet, .jsonl or .csv"),
    ("a directory of other things", lambda w: w.generate(w.file("dir/notes.md", "a").parent), 1, "Check --prompts"),
    ("a directory named .jsonl", lambda w: w.generate(w.file("p.jsonl/notes.md", "a").parent), 1, "Check --prompts"),
    ("no name", lambda w: w.generate(""), 1, "--prompts"),
    ("empty file", lambda w: w.generate(w.file("p.jsonl", "")), 1, "there are none"),
    ("blank lines", lambda w: w.generate(w.file("p.jsonl", "\n \n\n")), 1, "there are none"),
    ("broken JSON", lambda w: w.generate(w.file("p.jsonl", LINE * 2 + b'{"prompt": ')), 1, "line 3: not JSON"),
    ("deep JSON", lambda w: w.generate(w.file("p.jsonl", LINE + DEEP.encode())), 1, "line 2: not JSON"),
    ("a number of 5000 digits", lambda w: w.generate(w.file("p.jsonl", '{"prompt": ' + "1" * 5000 + "}")), 1, "not JSON"),
    ("an array", lambda w: w.generate(w.file("p.jsonl", '["a"]\n')), 1, "not an object"),
    ("another column", lambda w: w.generate(w.file("p.jsonl", '{"text": "a"}\n')), 1, "--prompt_column"),
    ("a column of numbers", lambda w: w.generate(w.jsonl(1, 2)), 1, "'not text': 2"),
    ("a column of bytes", lambda w: w.generate(w.table("p.parquet", [{"prompt": b"a"}])), 1, "'not text': 1"),
    ("all empty", lambda w: w.generate(w.jsonl("", " ", None)), 1, "'empty': 3"),
    ("all end with the assistant", lambda w: w.generate(w.jsonl([USER, BOT])), 1, "does not end with a user turn"),
    ("UTF-16", lambda w: w.generate(w.file("p.jsonl", LINE.decode().encode("utf-16"))), 1, "not UTF-8"),
    ("Latin-1", lambda w: w.generate(w.file("p.jsonl", '{"prompt": "é"}'.encode("latin-1"))), 1, "not UTF-8"),
    ("Latin-1 CSV", lambda w: w.generate(w.file("p.csv", "prompt\né\n".encode("latin-1"))), 1, "not a CSV file in UTF-8"),
    ("ragged CSV", lambda w: w.generate(w.file("p.csv", "prompt\na,b\n")), 1, "more or fewer fields"),
    ("CSV with a column twice", lambda w: w.generate(w.file("p.csv", "prompt,prompt\na,b\n")), 1, "twice"),
    ("CSV, a quote that is not closed", lambda w: w.generate(w.file("p.csv", 'prompt\na\n"b\nc\n')), 1, "begins at line 3"),
    ("broken JSON in a directory", lambda w: w.generate(w.file("dir/p.jsonl", LINE + b"{").parent), 1, "line 2: not JSON"),
    ("all with tool calls", lambda w: w.generate(w.jsonl([USER, {**BOT, "tool_calls": [{"id": "1"}]}, USER])), 1, "has tool_calls"),
    ("all in a chat template", lambda w: w.generate(w.jsonl("<s>[INST] a [/INST]")), 1, "in a chat template already"),
    ("all conversations as text", lambda w: w.generate(w.jsonl(str([USER]))), 1, "written as text"),
    ("CSV header alone", lambda w: w.generate(w.file("p.csv", "prompt\n")), 1, "there are none"),
    ("truncated Parquet", lambda w: w.generate(_cut(w.table("p.parquet", [{"prompt": "a"}]))), 1, "not a readable"),
    ("Parquet without rows", lambda w: w.generate(w.table("p.parquet", [], _schema())), 1, "there are none"),
    ("text named .parquet", lambda w: w.generate(w.file("p.parquet", "a\n")), 1, "not a readable Parquet"),
    ("one id, two prompts", lambda w: w.generate(w.file("p.jsonl", _ids(("1", "a"), ("1", "b")))), 1, "two different"),
    ("ids that clash", lambda w: w.generate(w.file("p.jsonl", _ids(("1", "a"), ("1", "a"), ("1-2", "b")))), 1, "clash"),
    ("an id of half a character", lambda w: w.generate(w.file("p.jsonl", _ids(("\ud83d", "a")))), 1, "prompt_id"),
    ("gemma, two user turns", lambda w: w.generate(w.jsonl([USER, USER]), f"--model={w.models}/gemma2"), 1, "refuses"),
    ("gemma, an unknown role", lambda w: w.generate(w.jsonl([{**USER, "role": "sage"}, USER]), f"--model={w.models}/gemma2"), 1, "refuses"),
    ("{iter} and split_prompts", lambda w: w.loop("--split_prompts", "--prompts=p-{iter}.jsonl"), 2, "{iter}"),
    ("Hub id offline", lambda w: w.generate("no/such-data"), 1, "HF_TOKEN and the network"),
    ("malformed Hub id", lambda w: w.generate("a/b/c/d"), 1, "Check --prompts"),
    ("part of words", lambda w: w.generate(w.good(), "--prompts_part=x"), 2, "two numbers like 0/3"),
    ("part of superscripts", lambda w: w.generate(w.good(), "--prompts_part=²/³"), 2, "two numbers like 0/3"),
    ("part beyond", lambda w: w.generate(w.good(), "--prompts_part=3/3"), 2, "two numbers like 0/3"),
    ("a precision for an engine without one", lambda w: w.generate(w.good(), "--dtype=bfloat16"), 1, "is for vLLM"),
    ("a part without prompts", lambda w: w.generate(w.good(), "--prompts_part=7/9"), 1, "--prompts_part"),
    ("no permission", lambda w: w.generate(_locked(w.good())), 1, "Permission denied"),
]  # fmt: skip

DATA: list[Case] = [
    ("a shard missing", lambda w: w.combine(_gone(w.shards(), "responses/shard-00001*")), 1, "not finished"),
    ("a shard too many", lambda w: w.combine(w.shards(3)), 1, "beyond --numgpu 2"),
    ("a shard changed", lambda w: w.combine(_changed(w.shards() / "responses/shard-00001.parquet")), 1, "changed after"),
    ("a shard's manifest damaged", lambda w: w.combine(_spoilt(w.shards(), "responses/shard-00000.manifest.json", "{")), 1, "damaged"),
    ("a shard's manifest empty", lambda w: w.combine(_spoilt(w.shards(), "responses/shard-00000.manifest.json", "{}")), 1, "damaged"),
    ("another K", lambda w: w.combine(w.shards(), "--pairs=3"), 1, "not --pairs 3"),
    ("another frac_len", lambda w: w.combine(w.shards(), "--frac_len=3"), 1, "not --frac_len 3"),
    ("responses of unknown prompts", lambda w: w.rank(w.responses(), "good", f"--prompts={w.good()}"), 1, "is not there"),
    ("no responses", lambda w: w.rank(w.d / "data"), 1, "draw the responses first"),
    ("responses without a column", lambda w: w.rank(w.table("data/responses.parquet", [{"prompt_id": "p"}]).parent), 1, "no column prompt"),
    ("prompts as text", lambda w: w.rank(w.responses({"prompt": "a"}, schema="inferred")), 1, "not a list of"),
    ("responses as text", lambda w: w.rank(w.responses({"responses": ["a", "b"]}, schema="inferred")), 1, "not a list of"),
    ("a response too few", lambda w: w.rank(w.responses({}, {"responses": [{"text": "a"}]})), 1, "not --pairs 2"),
    ("null responses", lambda w: w.rank(w.responses({}, {"responses": None})), 1, "not --pairs 2"),
    ("responses of numbers", lambda w: w.rank(w.responses({"responses": [{"text": 1}, {"text": 2}]}, schema="inferred")), 1, "not text"),
    ("a prompt of parts", lambda w: w.rank(w.responses({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, schema="inferred")), 1, "not text"),
    ("a null prompt", lambda w: w.rank(w.responses({}, {"prompt": None})), 1, "prompt p1"),
    ("a turn without a text", lambda w: w.rank(w.responses({"prompt": [{"role": "user", "content": None}]})), 1, "prompt p0"),
    ("a null id", lambda w: w.rank(w.responses({"prompt_id": None})), 1, "without a prompt_id"),
    ("an id twice", lambda w: w.rank(w.responses({"prompt_id": "p"}, {"prompt_id": "p"})), 1, "there twice"),
    ("rankings of other responses", lambda w: w.pair(w.ranking({"prompt_id": "x"})), 1, "another run's"),
    ("no ranking", lambda w: w.pair(w.responses()), 1, "run rank.py first"),
    ("a ranking truncated", lambda w: w.pair(_cut(w.ranking() / "ranking/shard-00000.parquet").parent.parent), 1, "not a readable"),
    ("logits that are not K x K", lambda w: w.pair(w.ranking({"logits": [[0.0, 1.0]]})), 1, "not (2, 2)"),
    ("logits of words", lambda w: w.pair(w.ranking({"logits": [["a", "b"]] * 2})), 1, "column logits"),
    ("no finite logit", lambda w: w.pair(w.ranking({"logits": [[NAN, NAN]] * 2})), 1, "logits not finite"),
    ("ranked twice", lambda w: w.pair(w.ranking({}, {"prompt_id": "p0"})), 1, "ranked twice"),
    ("hold-out of everything", lambda w: w.pair(w.ranking(), "--test_size=9"), 2, "leaves nothing to train on"),
    ("hold-out of a prompt and a half", lambda w: w.pair(w.ranking(), "--test_size=1.5"), 2, "a whole number"),
    ("a temperature of 0", lambda w: w.pair(w.ranking(), "--ranker_temperature=0"), 2, "ranker_temperature"),
    ("a way to select that is none", lambda w: w.pair(w.ranking(), "--select=best_wrost"), 2, "did you mean best_worst"),
    ("a margin above 1", lambda w: w.pair(w.ranking(), "--min_margin=2"), 2, "between 0 and 1"),
    ("auto without a manifest", lambda w: w.pair(w.ranking(), "--estimator=auto"), 2, "no manifest that names its ranker"),
    ("a system turn that PairRM would read", lambda w: w.rank(w.responses(), "good", "--ranker_system=drop"), 2, "reward-model"),
    ("no file of other models' answers", lambda w: w.combine(w.shards(), "--extra_responses=nowhere.jsonl"), 1, "no such file"),
    ("a foreign train.parquet", lambda w: w.pair(_spoilt(w.ranking(), "train.parquet", "mine")), 1, "move it away"),
    ("training data that is nowhere", lambda w: w.train(w.d / "no"), 1, "does not exist"),
    ("no chosen", lambda w: w.train(w.train_rows(lambda r: r.pop("chosen"))), 1, "no column chosen"),
    ("no chosen_probs", lambda w: w.train(w.train_rows(lambda r: r.pop("chosen_probs"))), 1, "no column chosen_probs"),
    ("a rate above 1", lambda w: w.train(w.train_rows(lambda r: r.update(chosen_probs=1.5))), 1, "between 0 and 1"),
    ("a content that is a number", lambda w: w.train(w.train_rows(lambda r: r.update(chosen=[{**m, "content": 1} for m in r["chosen"]]))), 1, "row 0: chosen"),
    ("a content with an image", lambda w: w.train(w.train_rows(lambda r: r.update(rejected=[{**m, "content": [{"type": "image"}]} for m in r["rejected"]]))), 1, "rejected: a message has parts that are not text"),
    ("a rate of NaN", lambda w: w.train(w.train_rows(lambda r: r.update(chosen_probs_win=NAN))), 1, "between 0 and 1"),
    ("a rate that is null", lambda w: w.train(w.train_rows(lambda r: r.update(chosen_probs_lose=None))), 1, "between 0 and 1"),
    ("chosen as text", lambda w: w.train(w.train_rows(lambda r: r.update(chosen="yes"))), 1, "ends with the assistant"),
    ("a chosen turn of null", lambda w: w.train(w.train_rows(lambda r: r["chosen"][-1].update(content=None))), 1, "row 0"),
    ("training data without rows", lambda w: w.train(w.table("data/train.parquet", [], _schema()).parent), 1, "no rows to train on"),
    ("sppo_all without responses", lambda w: w.train(w.train_rows(lambda r: r.pop("responses")), "--loss_type=sppo_all"), 1, "use --loss_type sppo"),
    ("sppo_all, responses as text", lambda w: w.train(w.train_rows(lambda r: r.update(responses=["a", "b", "c"])), "--loss_type=sppo_all"), 1, "row 0"),
    ("sppo_all, probabilities not K x K", lambda w: w.train(w.train_rows(lambda r: r["probability"].pop()), "--loss_type=sppo_all"), 1, "not 3 x 3"),
    ("training data from the Hub, offline", lambda w: w.train("no/such-data"), 1, "the Hub does not give it"),
    ("a push without data", lambda w: ["scripts/push_to_hub.py", f"--output_dir={w.responses()}", "--org=o", "--name=n"], 1, "run compute_prob.py first"),
]  # fmt: skip

RECIPES: list[Case] = [
    ("a typo", lambda w: w.recipe("lerning_rate: 1"), 2, "did you mean learning_rate"),
    ("a key twice", lambda w: w.recipe("pairs: 3\nbeta: 1\npairs: 5"), 2, "'pairs' is there twice"),
    ("a list", lambda w: w.recipe("- pairs"), 2, "key: value"),
    ("a word", lambda w: w.recipe("pairs"), 2, "key: value"),
    ("a tab", lambda w: w.recipe("chat_template_kwargs:\n\ta: 1"), 2, "not YAML"),
    ("a directory", lambda w: w.generate(w.good(), f"--recipe={w.d}"), 2, "directory"),
    ("not there", lambda w: w.generate(w.good(), "--recipe=no.yaml"), 2, "the project brings"),
    ("Latin-1", lambda w: w.recipe("system_prompt: é".encode("latin-1")), 2, "not YAML"),
    ("a NUL byte", lambda w: w.recipe(b"pairs: 3\0"), 2, "not YAML"),
    ("a Python object", lambda w: w.recipe("model: !!python/object/apply:os.getcwd []"), 2, "not YAML"),
    ("a day that is none", lambda w: w.recipe("model: 2024-99-99"), 2, "not YAML"),
    ("too deep", lambda w: w.recipe("model: " + "[" * 5000), 2, "not YAML"),
    ("a list for a text", lambda w: w.recipe("model: [a]"), 2, "is not a text"),
    ("nothing for a text", lambda w: w.recipe("model:"), 2, "is not a text"),
    ("a word for a number", lambda w: w.recipe("pairs: five"), 2, "a whole number"),
    ("true for a number", lambda w: w.recipe("pairs: true"), 2, "a whole number"),
    ("half a number", lambda w: w.recipe("pairs: 2.5"), 2, "a whole number"),
    ("too small a number", lambda w: w.recipe("pairs: 0"), 2, "at least 1"),
    ("a share above 1", lambda w: w.recipe("top_p: 1.5"), 2, "between"),
    ("no number", lambda w: w.recipe("beta: .nan"), 2, "at least"),
    ("an unknown loss", lambda w: w.recipe("loss_type: spo"), 2, "did you mean sppo"),
    ("a setting that is gone", lambda w: w.recipe("fused_attention: true"), 2, "this setting no longer exists; remove the line"),
    ("a list for a mapping", lambda w: w.recipe("chat_template_kwargs: [1]"), 2, "a mapping"),
    ("two colons", lambda w: w.recipe("a: b: c"), 2, "not YAML"),
    ("infinity for a whole number", lambda w: w.recipe("pairs: .inf"), 2, "a whole number"),
    ("infinity for a number", lambda w: w.recipe("temperature: .inf"), 2, "temperature"),
    ("a learning rate below 0", lambda w: w.recipe("learning_rate: -1"), 2, "at least 0"),
    ("a seed beyond what torch takes", lambda w: w.recipe(f"seed: {2**40}"), 2, "seed"),
    ("1 for a switch", lambda w: w.recipe("prompt_seeds: 1"), 2, "true or false"),
    ("an unknown backend", lambda w: w.recipe("ranker_backend: pairm"), 2, "did you mean pairrm"),
    ("a list for a choice", lambda w: w.recipe("loss_type: [sppo]"), 2, "is not one of"),
    ("a day in chat_template_kwargs", lambda w: w.recipe("chat_template_kwargs: {day: 2024-01-01}"), 2, "JSON"),
    ("a password in an address", lambda w: w.recipe("ranker_url: http://me:secret@h/v1"), 2, "ranker_url holds a password"),
    ("a key in an address", lambda w: w.recipe("ranker_url: http://h/v1?key=secret"), 2, "--ranker_url is an address"),
    ("a number as a key", lambda w: w.recipe("chat_template_kwargs: {1: 2}"), 2, "JSON"),
    ("one mark of a thought", lambda w: w.generate(w.good(), "--thinking_tags=<think>"), 2, "two different marks as OPEN,CLOSE"),
    ("a mark twice", lambda w: w.generate(w.good(), "--thinking_tags=<think>, <think>"), 2, "two different marks"),
    ("a budget of all tokens", lambda w: w.generate(w.good(), "--maxlen=9", "--thinking_budget=9"), 2, "below --maxlen 9"),
    ("a budget and no marks", lambda w: w.generate(w.good(), "--thinking_tags=off", "--thinking_budget=9"), 2, "--thinking_tags off"),
    ("a budget and no thoughts", lambda w: w.generate(w.good(), "--maxlen=20", "--thinking_budget=9"), 1, "no marks of a thought"),
    ("a date that no calendar has", lambda w: w.recipe("date: '2026-02-30'"), 2, "as YYYY-MM-DD"),
    ("a date in words", lambda w: w.recipe("date: 1 May 2026"), 2, "as YYYY-MM-DD"),
]  # fmt: skip

FLAGS: list[Case] = [
    ("unknown", lambda w: w.generate(w.good(), "--pair=3"), 2, "did you mean --pairs"),
    ("a word for a number", lambda w: w.generate(w.good(), "--temperature=x"), 2, "a number"),
    ("without its value", lambda w: w.generate(w.good(), "--seed"), 2, "--seed needs a value"),
    ("none at all", lambda w: ["scripts/generate.py"], 2, "--output_dir"),
    ("no model", lambda w: w.of_model(""), 1, "pass --model"),
    ("one response", lambda w: w.rank(w.responses(), "good", "--pairs=1"), 2, "at least 2"),
    ("the likeliest token K times", lambda w: w.generate(w.good(), "--temperature=0"), 2, "2 times the same"),
    ("data_frac beyond", lambda w: w.generate(w.good(), "--data_frac=3", "--numgpu=2"), 2, "beyond --numgpu 2"),
    ("frac_len below 0", lambda w: w.generate(w.good(), "--frac_len=-1"), 2, "0 or more"),
    ("no shards", lambda w: w.combine(w.d / "out", "--numgpu=0"), 2, "--numgpu"),
    ("a GPU without a name", lambda w: _shards(w, "--gpus=0,,1"), 2, "a list like 0,2,5"),
    ("a run directory of two lines", lambda w: [*w.loop(), "--run_dir=a\nb"], 2, "more than one line"),
    ("a run directory like a flag", lambda w: [*w.loop(), "--run_dir=-a"], 2, "begins with -"),
    ("a second judge without answers to judge", lambda w: [*w.loop(), "--judge=mine:longer"], 2, "--judge needs --eval_prompts"),
    ("a guard without a judge", lambda w: [*w.loop(), f"--eval_prompts={w.good()}", "--stop_when=judge"], 2, "--stop_when judge needs --judge"),
    ("a guard that is none", lambda w: [*w.loop(), "--stop_when=judges"], 2, "did you mean judge"),
    ("an iteration's recipe for a run", lambda w: [*w.loop(), "--iteration=2"], 2, "for one iteration by hand"),
    ("a GPU twice", lambda w: _shards(w, "--gpus=0,0"), 2, "named twice"),
    ("GPUs that do not divide", lambda w: _shards(w, "--gpus=0,1,2", "--world_size=2"), 2, "does not divide"),
    ("launch with a typo", lambda w: _shards(w, "--gpuss=0"), 2, "did you mean --gpus"),
    ("launch of nothing", lambda w: ["scripts/launch.py", "--gpus=none"], 2, "the script to run"),
    ("no such accelerate config", lambda w: _launch(w, "--accelerate_config=zero9"), 2, "the project brings"),
    ("accelerate config for GPUs", lambda w: _launch(w, "--accelerate_config=zero3"), 2, "is for GPUs"),
    ("accelerate config that is none", lambda w: _launch(w, f"--accelerate_config={w.file('c.yaml', '- a')}"), 2, "accelerate config"),
    ("chat_template_kwargs that is no JSON", lambda w: w.generate(w.good(), "--chat_template_kwargs={"), 2, "JSON"),
    ("label_smoothing with sppo", lambda w: w.train(None, "--label_smoothing=0.1"), 2, "for --loss_type sigmoid"),
    ("--reg without its weight", lambda w: w.train(None, "--reg=reverse"), 2, "--reg reverse needs --reg_coef"),
    ("--reg with a weight of 0", lambda w: w.train(None, "--reg=both", "--reg_coef=0"), 2, "--reg both needs --reg_coef"),
    ("a weight without --reg", lambda w: w.train(None, "--reg_coef=0.1"), 2, "name reverse, forward or both"),
    ("a weight below 0", lambda w: w.train(None, "--reg=reverse", "--reg_coef=-0.1"), 2, "is not between 0 and"),
    ("a weight of NaN", lambda w: w.train(None, "--reg=reverse", "--reg_coef=nan"), 2, "is not between 0 and"),
    ("an unknown divergence", lambda w: w.train(None, "--reg=revers", "--reg_coef=0.1"), 2, "did you mean reverse"),
    ("--reg with DPO", lambda w: w.train(None, "--reg=reverse", "--reg_coef=0.1", "--loss_type=sigmoid"), 2, "sppo_all, not sigmoid"),
    ("--reg and --anchor", lambda w: w.train(None, "--reg=forward", "--reg_coef=0.1", "--anchor=0.1"), 2, "take one of them"),
    ("--reg from nowhere", lambda w: w.train(None, "--reg=reverse", "--reg_coef=0.1"), 2, "--reg needs --anchor_model"),
    ("an anchor's revision alone", lambda w: w.train(None, "--reg=forward", "--reg_coef=0.1", "--anchor_revision=v1"), 2, "goes with --anchor_model"),
    ("a --reg that does nothing", lambda w: w.train(None, "--reg=forward", "--reg_coef=1e-60"), 2, "of 1e-12 or more"),
    ("a --reg that overflows", lambda w: w.train(None, "--reg=forward", "--reg_coef=1e38"), 2, "is not between 0 and"),
    ("an anchor's model for nothing", lambda w: w.train(None, "--anchor_model=m"), 2, "goes with --anchor or --reg"),
    ("--reg and 4 bits", lambda w: w.train(None, "--reg=reverse", "--reg_coef=0.1", "--use_peft", "--load_in_4bit"), 2, "--reg with --load_in_4bit"),
    ("4 bits without LoRA", lambda w: w.train(None, "--load_in_4bit"), 2, "goes with --use_peft"),
    ("no room for a response", lambda w: w.train(None, "--max_prompt_length=90"), 2, "the response needs room"),
    ("an uneven batch", lambda w: w.train(None, "--batch_size=3"), 2, "change --batch_size"),
    ("no epochs", lambda w: w.train(None, "--num_train_epochs=0"), 2, "above 0"),
    ("unknown optimiser", lambda w: w.train(None, "--optim=rmsprob"), 2, "did you mean rmsprop"),
    ("unknown schedule", lambda w: w.train(None, "--lr_scheduler_type=linaer"), 2, "did you mean linear"),
    ("a directory called as a package", lambda w: w.train(None, f"--report_to={_called(w, 'trackio')}"), 2, "pip install trackio"),
    ("an open quote in sbatch's flags", lambda w: w.loop("--dry_run", "--skip_preflight", "--launcher=slurm", "--sbatch=--comment='x"), 2, "No closing quotation"),
    ("wandb, not installed", lambda w: w.train(None, "--report_to=trackio"), 2, "pip install trackio"),
    ("unknown attention", lambda w: w.train(None, "--attn_implementation=fast"), 1, "cannot be loaded"),
    ("attention that is not installed", lambda w: w.train(None, "--attn_implementation=flash_attention_2"), 1, "cannot be loaded"),
    ("LoRA on modules that are not there", lambda w: w.train(None, "--use_peft", "--lora_target_modules=nope"), 1, "--lora_target_modules"),
    ("push without a name", lambda w: w.pair(w.ranking(), "--org=o"), 2, "--org needs --name"),
    ("an organisation with a slash", lambda w: ["scripts/push_to_hub.py", f"--output_dir={w.d}", "--org=a/b", "--name=n"], 2, "Repo id must"),
    ("report on no prompts", lambda w: ["scripts/report.py", f"--run_dir={w.d}", "--iteration=1", "--base=b"], 2, "--eval_prompts is missing"),
    ("a measure that is not there", lambda w: _report(w, "--measure=json:no_such"), 2, "--measure"),
    ("no prompts to make", lambda w: ["scripts/make_instructions.py", f"--output_dir={w.d}/p", "--train=0"], 2, "from 1 to 10000"),
    ("prompts where others are", lambda w: ["scripts/make_instructions.py", f"--output_dir={w.file('o/x', 'mine').parent}"], 1, "did not make"),
    ("SmolLM2 where another model is", lambda w: ["scripts/make_smollm2.py", f"--output_dir={w.model()}"], 1, "did not make"),
    ("a token as a name", lambda w: w.loop("--skip_preflight", "--org", "hf_" + "a" * 34), 2, "--org holds a password or a token"),
    ("a model at an address with a password", lambda w: w.loop("--skip_preflight", "--model=https://me:secret@host/m"), 2, "--model holds a password"),
    ("a key among sbatch's flags", lambda w: w.loop("--skip_preflight", f"--sbatch=--export=K=sk-{'aB1' * 16}"), 2, "--sbatch holds a password"),
    ("half a character", lambda w: w.generate(w.good(), "--system_prompt=\udcff"), 2, "UTF-8"),
]  # fmt: skip

MODELS: list[Case] = [
    ("missing", lambda w: w.of_model(w.d / "no"), 1, "no such directory"),
    ("no config.json", lambda w: w.of_model(w.model(config__json=remove)), 1, "without a config.json"),
    ("config.json not JSON", lambda w: w.of_model(w.model(config__json=write("{"))), 1, "config.json"),
    ("config.json a list", lambda w: w.of_model(w.model(config__json=write("[1]"))), 1, "config.json"),
    ("unknown architecture", lambda w: w.of_model(w.model(config__json=edit(model_type="lama4"))), 1, "lama4"),
    ("no model_type", lambda w: w.of_model(w.model(config__json=edit(model_type=None))), 1, "model_type"),
    ("truncated weights", lambda w: w.of_model(w.model(model__safetensors=truncate)), 1, "cannot be loaded"),
    ("pickled weights only", lambda w: w.of_model(w.model(model__safetensors=pickled)), 1, "convert it"),
    ("no weights", lambda w: w.of_model(w.model(model__safetensors=remove)), 1, "no model.safetensors in it"),
    ("a weight missing", lambda w: w.of_model(w.model(model__safetensors=weights(lambda t: t.pop("model.norm.weight")))), 1, "model.norm.weight"),
    ("a weight of another shape", lambda w: w.of_model(w.model(model__safetensors=weights(lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:9]})))), 1, "model.norm.weight"),
    ("weights of NaN", lambda w: w.of_model(w.model(model__safetensors=weights(lambda t: t["model.norm.weight"].fill_(NAN)))), 1, "not finite"),
    ("a shard missing", lambda w: w.of_model(w.model(model__safetensors=sharded)), 1, "model-00002-of-00002.safetensors"),
    ("no tokenizer", lambda w: w.of_model(w.model(tokenizer__json=remove, tokenizer_config__json=remove)), 1, "tokenizer cannot be loaded"),
    ("tokenizer.json damaged", lambda w: w.of_model(w.model(tokenizer__json=truncate)), 1, "tokenizer cannot be loaded"),
    ("tokenizer_config.json damaged", lambda w: w.of_model(w.model(tokenizer_config__json=truncate)), 1, "tokenizer_config.json is damaged"),
    ("no chat template", lambda w: w.of_model(w.model(chat_template__jinja=remove)), 1, "no chat template"),
    ("a chat template with an error", lambda w: w.of_model(w.model(chat_template__jinja=write("{% for"))), 1, "chat template"),
    ("no end of sequence", lambda w: w.of_model(w.model(generation_config__json=remove, tokenizer_config__json=edit(eos_token=None), config__json=edit(eos_token_id=None))), 1, "no end-of-sequence token"),
    ("generation_config.json damaged", lambda w: w.of_model(w.model(generation_config__json=write("{"))), 1, "generation_config.json"),
    ("an end token that is a word", lambda w: w.of_model(w.model(generation_config__json=edit(eos_token_id="</s>"))), 1, "generation_config.json"),
    ("an end token below 0", lambda w: w.of_model(w.model(generation_config__json=edit(eos_token_id=-1))), 1, "eos_token_id is -1"),
    ("an end token that is a switch", lambda w: w.of_model(w.model(generation_config__json=edit(eos_token_id=True))), 1, "eos_token_id is True"),
    ("an end token beyond the model's", lambda w: w.of_model(w.model(generation_config__json=edit(eos_token_id=[2, 99999]))), 1, "none for token 99999"),
    ("an embedding smaller than the tokenizer", lambda w: w.of_model(w.model(config__json=edit(vocab_size=300), model__safetensors=weights(_fewer_rows))), 1, "rows"),
    ("an adapter whose base is gone", lambda w: w.of_model(w.adapter()), 1, "no such directory"),
    ("an adapter that names no base", lambda w: w.of_model(w.adapter(base_model_name_or_path=None)), 1, "base_model_name_or_path"),
    ("an adapter without weights", lambda w: w.of_model(w.adapter(False, base_model_name_or_path=str(w.models / "llama3"))), 1, "no adapter_model.safetensors in it"),
    ("an adapter with a weight missing", lambda w: w.of_model(_incomplete(w)), 1, "missing adapter keys"),
    ("an adapter truncated", lambda w: w.of_model(_cut(_incomplete(w) / "adapter_model.safetensors").parent), 1, "adapter"),
    ("trained: a weight missing", lambda w: w.train(None, f"--model={w.model(model__safetensors=weights(lambda t: t.pop('model.norm.weight')))}"), 1, "model.norm.weight"),
    ("a Hub id offline", lambda w: w.of_model("no/such-model"), 1, "the Hub does not give it"),
    ("a malformed name", lambda w: w.of_model("a b:c"), 1, "no such directory"),
]  # fmt: skip

RANKERS: list[Case] = [
    ("missing directory", lambda w: w.rank(w.responses(), w.d / "no"), 1, "no such directory"),
    ("a key missing", lambda w: w.rank(w.responses(), w.model("PairRM", model__safetensors=weights(lambda t: t.pop("head_layer.1.bias")))), 1, "head_layer.1.bias"),
    ("a key left over", lambda w: w.rank(w.responses(), w.model("PairRM", model__safetensors=weights(lambda t: t.update({"head_layer.9.bias": t["head_layer.1.bias"].clone()})))), 1, "head_layer.9.bias"),
    ("truncated weights", lambda w: w.rank(w.responses(), w.model("PairRM", model__safetensors=truncate)), 1, "ranker"),
    ("pickled weights only", lambda w: w.rank(w.responses(), w.model("PairRM", model__safetensors=pickled)), 1, "pickled weights are not read"),
    ("config.json damaged", lambda w: w.rank(w.responses(), w.model("PairRM", config__json=write("{"))), 1, "damaged"),
    ("the base gone", lambda w: w.rank(w.responses(), w.model("PairRM", config__json=edit(model_name="no/such-base"))), 1, "the ranker's base model"),
    ("a chat model as PairRM", lambda w: w.rank(w.responses(), w.models / "llama3"), 1, "is not a PairRM"),
    ("two labels", lambda w: w.rank(w.responses(), w.classifier(2), "--ranker_backend=reward-model"), 1, "has one label"),
    ("PairRM as a reward model", lambda w: w.rank(w.responses(), w.models / "PairRM", "--ranker_backend=reward-model"), 1, "pass --ranker_backend pairrm"),
    ("a chat model as a GPM", lambda w: w.rank(w.responses(), w.models / "llama3", "--ranker_backend=gpm"), 1, "no value_head.weight"),
    ("a PairRM as a causal LM", lambda w: w.rank(w.responses(), w.models / "PairRM", "--ranker_backend=pair-lm"), 1, "pass --ranker_backend pairrm"),
    ("a template that is not there", lambda w: w.rank(w.responses(), w.models / "llama3", "--ranker_backend=pair-lm", "--ranker_template=no/such.txt"), 2, "no such file; it is a file, or one of judge, rlhflow"),
    ("a template without a field", lambda w: w.rank(w.responses(), w.models / "llama3", "--ranker_backend=pair-lm", f"--ranker_template={w.file('t', '{conversation} {first}')}"), 2, "no {second} in it"),
    ("a template with an unknown field", lambda w: w.rank(w.responses(), w.models / "llama3", "--ranker_backend=pair-lm", f"--ranker_template={w.file('t', '{conversation} {first} {second} {prompt}')}"), 2, "unknown field {prompt}"),
    ("a template for another ranker", lambda w: w.rank(w.responses(), w.models / "PairRM", "--ranker_template=rlhflow"), 2, "is for --ranker_backend pair-lm"),
    ("no such module", lambda w: w.rank(w.responses(), "no_module:f"), 2, "can be imported"),
    ("no such function", lambda w: w.rank(w.responses(), "nothing"), 2, "can be imported"),
    ("not a function", lambda w: w.rank(w.responses(), "raised"), 2, "not a function"),
    ("a module that raises", lambda w: w.rank(w.responses(), _module(w, "1 / 0")), 2, "ZeroDivisionError"),
    ("a module with a syntax error", lambda w: w.rank(w.responses(), _module(w, "def")), 2, "can be imported"),
    ("a function that raises", lambda w: w.rank(w.responses(), "raises"), 1, "no GPU for you"),
    ("a function that says a word", lambda w: w.rank(w.responses(), "words"), 1, "not a number"),
    ("a judge's votes without a judge", lambda w: w.rank(w.responses(), w.models / "PairRM", "--judge_votes=3"), 2, "--judge_votes is for --ranker_backend judge"),
    ("a judge without an address", lambda w: w.rank(w.responses(), "m", "--ranker=m", "--ranker_backend=judge"), 2, "needs --ranker_url"),
    ("a judge with a password in its address", lambda w: w.rank(w.responses(), "m", "--ranker=m", "--ranker_backend=judge", "--ranker_url=http://me:secret@127.0.0.1:9/v1"), 2, "set OPENAI_API_KEY"),
    ("a judge with a key in its address", lambda w: w.rank(w.responses(), "m", "--ranker=m", "--ranker_backend=judge", "--ranker_url=http://127.0.0.1:9/v1?api_key=s"), 2, "set OPENAI_API_KEY"),
    ("a judge that is not there", lambda w: w.rank(w.responses(), "m", "--ranker=m", *_judge("http://127.0.0.1:9/v1")), 1, "gives no answer"),
    ("a judge at no address", lambda w: w.rank(w.responses(), "m", "--ranker=m", *_judge("localhost:8000")), 2, "no address of a server"),
    ("a judge's port that is a word", lambda w: w.rank(w.responses(), "m", "--ranker=m", *_judge("http://127.0.0.1:port/v1")), 2, "no address of a server"),
    ("a judge's address with a line break", lambda w: w.rank(w.responses(), "m", "--ranker=m", *_judge("http://127.0.0.1:9/v1\n")), 2, "no address of a server"),
    ("an address that nobody asks", lambda w: w.rank(w.responses(), "m", "--ranker=qwen3:8b", "--ranker_url=http://127.0.0.1:9/v1"), 2, "--ranker_url is for --ranker_backend judge or reward-server"),
    ("--judge's form for --ranker", lambda w: w.rank(w.responses(), "m", f"--ranker=reward-model:{w.models}"), 2, "--ranker_backend says what asks a model"),
    ("a file for a module", lambda w: w.rank(w.responses(), "m", "--ranker=./mine.py:longer"), 2, "nor module:name of a function or class"),
    ("a backend for a module", lambda w: w.rank(w.responses(), "m", "--ranker=pairrm:x"), 2, "--ranker_backend says what asks a model"),
    ("a function in another module of that name", lambda w: w.rank(w.responses(), "m", "--ranker=random:longer"), 2, "there is no longer in random, /"),
    ("a reward model as a causal LM", lambda w: w.rank(w.responses(), w.classifier(1), "--ranker_backend=pair-lm"), 1, "a reward model's backend is reward-model"),
    ("a template that is a directory", lambda w: w.rank(w.responses(), w.models / "llama3", "--ranker_backend=pair-lm", f"--ranker_template={w.d}"), 2, "cannot be read (Is a directory)"),
    ("a word in braces in a template", lambda w: w.rank(w.responses(), w.models / "llama3", "--ranker_backend=pair-lm", f"--ranker_template={w.file('t', '{conversation} {first} {second} {json}')}"), 2, "a space inside its braces: { json }"),
    ("llm-blender not installed", lambda w: w.rank(w.responses(), _hide(w, "llm_blender", w.models / "PairRM"), "--ranker_backend=llm-blender"), 1, "pip install"),
    ("openai not installed", lambda w: w.rank(w.responses(), _hide(w, "openai", "m"), "--ranker=m", *_judge("http://127.0.0.1:9/v1")), 1, "pip install"),
    ("ranker.json damaged", lambda w: w.rank(_spoilt(w.responses(), "ranker.json", "[]")), 1, "ranker.json"),
    ("preload of nothing", lambda w: ["scripts/preload.py", "--ranker=no/such-ranker"], 1, "the Hub does not give it"),
]  # fmt: skip

ENVIRONMENT: list[Case] = [
    ("output_dir is a file", lambda w: w.generate(w.good(), f"--output_dir={w.file('o', 'mine')}"), 1, "o"),
    ("output_dir in a file", lambda w: w.pair(w.file("o", "mine") / "data"), 1, "draw the responses first"),
    ("the model's directory is a file", lambda w: w.train(None, f"--output_dir={w.file('o', 'mine')}"), 1, "o"),
    ("the model's directory has another's model", lambda w: w.train(None, f"--output_dir={w.file('m/notes.txt', 'mine').parent}"), 1, "notes.txt. They would be lost"),
    ("run_dir is a file", lambda w: w.loop(f"--run_dir={w.file('o', 'mine')}"), 1, "o"),
    ("output_dir is read-only", lambda w: w.generate(w.good(), f"--output_dir={_locked(w.file('o/x', 'mine').parent)}"), 1, "Permission denied"),
    ("a model's name offline", lambda w: w.of_model("gpt2"), 1, "the Hub does not give it"),
    ("vLLM not installed", lambda w: w.generate(_hide(w, "vllm", w.good()), "--engine=vllm"), 1, "pip install"),
    ("CUDA_VISIBLE_DEVICES of GPUs that are not there", lambda w: _launch(w, "--gpus=auto", CUDA_VISIBLE_DEVICES="7"), 2, "no GPU"),
    ("a path that is too long", lambda w: w.generate(w.good(), f"--output_dir={w.d}/{'x' * 300}"), 1, "too long"),
]  # fmt: skip


def _cut(path: Path) -> Path:
    truncate(path)
    return path


def _ids(*rows: tuple[str, str]) -> str:
    import json

    return "".join(json.dumps({"prompt_id": i, "prompt": p}) + "\n" for i, p in rows)


def _locked(path: Path) -> Path:
    if os.geteuid() == 0:
        pytest.skip("root may read and write everything")
    path.chmod(0o500 if path.is_dir() else 0)
    return path


def _gone(out: Path, pattern: str) -> Path:
    for path in out.glob(pattern):
        path.unlink()
    return out


def _changed(path: Path) -> Path:
    path.write_bytes(path.read_bytes() + b"x")
    return path.parent.parent


def _spoilt(out: Path, name: str, text: str) -> Path:
    (out / name).write_text(text)
    return out


def _schema() -> Any:
    from sppo.schema import training_schema

    return training_schema()


def _fewer_rows(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if tensor.shape[0] > 300:
            tensors[name] = tensor[:300].clone()


def _incomplete(w: World) -> Path:
    directory = tiny.lora(w.models / "llama3", w.d / "lora")
    weights(lambda tensors: tensors.pop(sorted(tensors)[0]))(directory / "adapter_model.safetensors")
    return directory


def _module(w: World, text: str) -> str:
    w.file("broken_ranker.py", text)
    w.patch.syspath_prepend(str(w.d))
    sys.modules.pop("broken_ranker", None)
    return "broken_ranker:f"


def _judge(url: str) -> tuple[str, ...]:
    return "--ranker_backend=judge", f"--ranker_url={url}", "--ranker_retries=0"


def _hide(w: World, module: str, value: Any) -> Any:
    """As if the package were not installed."""
    w.patch.setitem(sys.modules, module, None)
    if module == "vllm":
        w.patch.delitem(sys.modules, module)
        w.patch.setattr("importlib.util.find_spec", lambda name, *_: None)
    return value


def _called(w: World, package: str) -> str:
    """A directory of a package's name where Python looks; the package is not installed."""
    w.file(f"{package}/log.txt", "")
    w.patch.syspath_prepend(str(w.d))
    return package


def _report(w: World, *flags: str) -> list[str]:
    return ["scripts/report.py", f"--run_dir={w.d}", "--iteration=1", "--base=b", f"--eval_prompts={w.good()}", *flags]


def _launch(w: World, *flags: str, **environment: str) -> list[str]:
    for name, value in environment.items():
        w.patch.setenv(name, value)
    return ["scripts/launch.py", *w.train(), "--gpus=none", f"--logs={w.d / 'logs'}", *flags]


def _shards(w: World, *flags: str) -> list[str]:
    return ["scripts/launch.py", "scripts/generate.py", f"--output_dir={w.d}", *flags]


GROUPS = {
    "prompts": PROMPTS,
    "data": DATA,
    "recipes": RECIPES,
    "flags": FLAGS,
    "models": MODELS,
    "rankers": RANKERS,
    "environment": ENVIRONMENT,
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=f"{group}: {c[0]}") for group, cases in GROUPS.items() for c in cases]
)
def test_bad_input(case: Case, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, make, code, message = case
    monkeypatch.chdir(tiny.ROOT)
    command = make(World(tmp_path, models, monkeypatch))
    before = tiny.contents(tmp_path)
    found, said = call(command, {})
    if (found, "Traceback" in said, message in said) != (code, False, True):
        pytest.fail(f"exit code {found}, not {code} with {message!r}:\n{said[-3000:]}", pytrace=False)
    assert not re.search("secret|hf_a|sk-a|api_key=s", said), "a password is shown"
    after = tiny.contents(tmp_path)
    assert {name: after.get(name) for name in before} == before, "something that was there is lost"
    assert not [n for n in after if n not in before and n.endswith(FINAL)], "half an output under its final name"


# through a process of its own, as a user's shell does it


def test_processes_end_with_the_same_codes(models: Path, tmp_path: Path) -> None:
    """One of each code, Python and bash: nothing in this process stands in for what a shell would see."""
    prompts, model = tmp_path / "no.jsonl", models / "llama3"
    generate = ["scripts/generate.py", "--model", model, "--output_dir", tmp_path / "out"]
    for command, code, message in (
        ([*generate, "--prompts", prompts], 1, "no such file"),
        (["scripts/generate.sh", "--model", model, "--prompt", prompts], 2, "--output_dir (--out_path) is missing"),
        (["scripts/generate.sh", "--out_path"], 2, "--out_path/--output_dir needs a value"),
        (["scripts/pipeline.sh", "--dataset=d", "--output_dir", tmp_path / "m", "word"], 2, "word is not a flag"),
    ):
        done = tiny.run(*command)
        assert (done.returncode, "Traceback" in done.stderr, message in done.stderr) == (code, False, True), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_bare_environment_works(models: Path, tmp_path: Path) -> None:
    """LANG=C with a path and prompts that are not ASCII, no HOME, a TMPDIR that is not there, columns too many."""
    directory = tmp_path / "größe 目录"
    directory.mkdir()
    rows = [{"prompt": "Größe? 目录 🙂", "prompt_id": "é", "more": [1]}, {"prompt": [{**USER, "name": "x"}]}]
    prompts = tiny.write_jsonl(directory / "p.jsonl", rows)
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "LANG", "LC_ALL", "PYTHONUTF8")}
    environment |= {"LC_ALL": "C", "TMPDIR": str(tmp_path / "no"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "scripts/generate.py", f"--model={models / 'llama3'}", f"--prompts={prompts}"]
    command += [f"--output_dir={directory}", "--pairs=2", "--maxlen=2", "--engine=transformers"]
    done = subprocess.run(command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = pq.read_table(directory / "responses" / "shard-00000.parquet").to_pylist()
    assert (found[0]["prompt_id"], found[0]["prompt"][0]["content"]) == ("é", "Größe? 目录 🙂")


# what looks bad and is not: taken as it is, and counted where something is left out

FINE: list[tuple[str, Callable[[World], list[str]], str]] = [
    ("a byte order mark and Windows line ends", lambda w: w.generate(w.file("p.jsonl", b"\xef\xbb\xbf" + LINE.replace(b"\n", b"\r\n") * 2)), '"written": 2'),
    ("a CSV with NUL bytes", lambda w: w.generate(w.file("p.csv", "prompt\na\0b\n")), '"written": 1'),
    ("a line of 2 MB", lambda w: w.generate(w.jsonl("a", "b " * 10**6)), "too long for the model's context"),
    ("some unusable prompts", lambda w: w.generate(w.jsonl("a", "", 7, "\ud83d", [USER, BOT])), '"not text": 2'),
    ("a shard without a usable prompt", lambda w: w.generate(w.jsonl("a", ""), "--numgpu=2", "--data_frac=1"), '"written": 0'),
    ("an empty recipe", lambda w: w.recipe(""), '"written": 2'),
    ("a weight that nothing reads", lambda w: w.of_model(w.model(model__safetensors=weights(lambda t: t.update({"extra.weight": t["model.norm.weight"].clone()})))), '"written": 2'),
    ("null texts among responses", lambda w: w.rank(w.responses({"responses": [{"text": None}, {"text": "a"}]})), '"written": 1'),
    ("a ranker that says NaN", lambda w: w.rank(w.responses(), "nan"), "not finite"),
    ("responses with columns too many", lambda w: w.rank(w.responses({"more": 1}, schema="inferred")), '"written": 1'),
    ("a journal of another model without work", lambda w: _stale_journal(w), '"written": 2'),
]  # fmt: skip


def _stale_journal(w: World) -> list[str]:
    """A try that failed before its first answer, under a model that was mended since."""
    code, said = call(w.of_model(w.model(model__safetensors=truncate)), {})
    assert code == 1, said
    return w.of_model(w.models / "llama3")


@pytest.mark.parametrize("case", [pytest.param(c, id=c[0]) for c in FINE])
def test_input_that_looks_bad_and_is_not(
    case: tuple[str, Callable[[World], list[str]], str],
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tiny.ROOT)
    code, said = call(case[1](World(tmp_path, models, monkeypatch)), {})
    assert (code, case[2] in said) == (0, True), said[-3000:]
