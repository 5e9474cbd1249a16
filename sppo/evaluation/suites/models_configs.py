"""alpaca-eval's own model configuration of a checkpoint, for who wants `alpaca_eval evaluate_from_model`.

vLLM's server draws the answers, with the chat template in the checkpoint's directory. alpaca-eval's in-process vLLM
would put a second BOS in front of what that template makes.
"""

from __future__ import annotations

import json
from pathlib import Path

from sppo.command.errors import SPPOError
from sppo.models.policy import open_policy
from sppo.recipe import Recipe
from sppo.store.files import atomic

URL = "http://localhost:8000/v1"
_USER_TURN = "Mixtral-8x7B-Instruct-v0.1/togetherai_prompt.txt"  # in alpaca-eval: the instruction as a user turn


def write(model: str, name: str, recipe: Recipe, url: str, out: Path) -> Path:
    """Write out/<name>/configs.yaml for a model and return its path. Sampling is the recipe's.

    Raises SPPOError for what is no chat model: a directory without config, weights, tokenizer or chat template.
    """
    policy = open_policy(model)
    policy.tokenizer()
    serve = f"vllm serve {model} --served-model-name {name}"
    if policy.adapter:
        serve = f"vllm serve {policy.weights} --enable-lora --lora-modules {name}={model}"
    values = {
        "model_name": name,
        "max_tokens": recipe.maxlen,
        "temperature": recipe.temperature,
        "top_p": recipe.top_p,
        "requires_chatml": True,
        "client_kwargs": {"base_url": url},
    }
    if recipe.chat_template_kwargs:
        values["extra_body"] = {"chat_template_kwargs": recipe.chat_template_kwargs}
    if recipe.system_prompt:
        raise SPPOError("alpaca-eval's configuration has no place for --system_prompt; use scripts/evaluate.sh")
    lines = [
        f"# AlpacaEval 2 of {model}; made by: python scripts/make_models_configs.py --model {model} --name {name}",
        f"#   {serve}",
        f"#   alpaca_eval evaluate_from_model --model_configs $PWD/{out / name}    # the judge wants OPENAI_API_KEY",
        f"{name}:",
        f"  prompt_template: {json.dumps(_USER_TURN)} # the bare instruction; the server applies the chat template",
        '  fn_completions: "openai_completions"',
        "  completions_kwargs:",
        *(f"    {key}: {json.dumps(value)}" for key, value in values.items()),
        f"  pretty_name: {json.dumps(name)}",
    ]
    path = out / name / "configs.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
