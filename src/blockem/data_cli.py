"""`blockem data check`: parse, call one function, print."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from blockem.cli_options import AsJson

data_app = typer.Typer(help="Chat data: check it before you train on it.", no_args_is_help=True, rich_markup_mode=None)


@data_app.command("check")
def data_check(
    data: Annotated[str | None, typer.Argument(help="Chat JSONL (default: the bundled domain).")] = None,
    domain: Annotated[str, typer.Option(help="Bundled domain, when no file is given.")] = "health",
    model: Annotated[str, typer.Option(help="Whose chat template is used.")] = "embedded",
    max_tokens: Annotated[int, typer.Option(min=16, help="Rows are cut after so many tokens.")] = 512,
    as_json: AsJson = False,
) -> None:
    """Show which tokens of three rows are learnt from, and count rows, tokens, truncations, duplicates and useless rows."""
    from dataclasses import asdict

    from blockem import bundled
    from blockem.examples import encode_all, masked_text, read_chat
    from blockem.model import load_tokenizer
    from blockem.progress import printable

    tokenizer = load_tokenizer(model)
    examples = read_chat(data) if data else bundled.domain_rows(domain)
    rows, counted = encode_all(tokenizer, examples, max_tokens)
    if as_json:
        print(json.dumps(asdict(counted), ensure_ascii=False))
        return
    for row in rows[:3]:
        print(printable(masked_text(tokenizer, row)), end="\n\n")
    print("(tokens between ⟦ and ⟧ are learnt from)\n")
    print(f"rows {counted.rows}, kept {counted.kept}, duplicates {counted.duplicates}, truncated {counted.truncated}")
    print(f"tokens {counted.tokens}, supervised {counted.supervised_tokens}")
    print(f"rows with nothing to learn from (dropped): {len(counted.dropped)}")
    for line in counted.dropped[:10]:
        print(f"  {printable(line)}")
