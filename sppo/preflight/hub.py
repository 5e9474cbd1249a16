"""What pushing to the Hub needs, looked at before a run starts: a token that may write where --org says."""

from __future__ import annotations

from sppo.command.errors import SPPOError
from sppo.hub.errors import explain
from sppo.preflight.facts import Run
from sppo.preflight.findings import Look, no, note, ok
from sppo.store.files import has_begun


def check_hub(run: Run) -> Look[None]:
    if not run.recipe.org or not (run.makes_data or (run.recipe.push_model and run.trains)):
        return
    from huggingface_hub import HfApi

    org = run.recipe.org
    try:
        me = HfApi().whoami()
    except Exception as error:  # noqa: BLE001 - whatever the HTTP library raises where there is no network
        trouble = explain(error)
        if trouble.passes and has_begun(run.run_dir):  # what passes by itself must not end it
            yield note(f"--org {org}: {trouble.text}; the run goes on, and names at its end what is not pushed")
            return
        raise SPPOError(f"--org {org}: {trouble}") from None
    may = ((me.get("auth") or {}).get("accessToken") or {}).get("role", "")
    if may == "read":
        yield no(f"the token of {me['name']} may only read; make one that may write, and set HF_TOKEN")
    roles = {o["name"]: o.get("roleInOrg", "") for o in me.get("orgs", [])}
    if org != me["name"] and org not in roles:
        yield no(f"{me['name']} does not belong to --org {org}; its own: {', '.join([me['name'], *roles])}")
    elif org != me["name"] and roles[org] == "read":
        yield no(f"{me['name']} may only read in --org {org}; ask for the role `write`, or use another --org")
    elif may != "read":
        yield ok(f"{me['name']} may push to {org}")
    if may == "fineGrained":
        yield note(f"the token is fine-grained: see that it may write to repositories of {org}")
