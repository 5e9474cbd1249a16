"""What pushing to the Hub needs, looked at before a run starts: a token that may write where --org says."""

from __future__ import annotations

from sppo.command.errors import SPPOError
from sppo.preflight.facts import Run
from sppo.preflight.findings import Findings, no, note, ok

_LATER = "the run goes on, and names at its end what is not pushed"


def check_hub(run: Run) -> Findings:
    if not run.recipe.org or not (run.makes_data or (run.recipe.push_model and run.trains)):
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    org = run.recipe.org
    try:
        me = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise SPPOError(f"--org {org}: pushing needs a token; set HF_TOKEN or run `hf auth login`") from None
    except OfflineModeIsEnabled:
        raise SPPOError(f"--org {org}: with HF_HUB_OFFLINE=1 nothing is pushed; unset it, or leave --org out") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status >= 500 and run.has_begun:
            yield note(f"--org {org}: the Hub answers with HTTP {status}; {_LATER}")
            return
        advice = "set HF_TOKEN to a valid one" if status in (401, 403) else "try again later, or leave --org out"
        raise SPPOError(f"--org {org}: the Hub does not take the token (HTTP {status}); {advice}") from None
    except Exception as error:  # noqa: BLE001 - whatever the HTTP library raises where there is no network
        if run.has_begun:
            yield note(f"--org {org}: the Hub is out of reach ({type(error).__name__}: {error}); {_LATER}")
            return
        raise SPPOError(f"--org {org}: the Hub is out of reach ({type(error).__name__}: {error})") from None
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
