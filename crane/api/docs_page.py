"""An OpenAPI document as one HTML page: no script, no style sheet, no font from anywhere."""

from html import escape

import msgspec

HTML = "text/html; charset=utf-8"
_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
summary { cursor: pointer; padding: .3rem 0 } summary p { display: inline; margin-left: 1rem; opacity: .75 }
code, th { font: 13px/1.5 ui-monospace, monospace } .method { font-weight: bold; display: inline-block; width: 4rem }
details { border-top: 1px solid #8885 } details > div { margin: 0 0 1rem 1rem }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .2rem .8rem .2rem 0;
vertical-align: top; border-top: 1px solid #8883; font-weight: normal } td { overflow-wrap: anywhere }
"""


def page(document: dict) -> bytes:
    """The whole page, as UTF-8."""
    info, paths = document["info"], document["paths"]
    tags: dict[str, list[str]] = {}
    for path, methods in paths.items():
        for method, operation in methods.items():
            tags.setdefault(operation["tags"][0], []).append(_operation(method, path, operation))
    schemas = "".join(
        # a link opens the details that its goal is inside of
        f"<details><summary><code>{escape(name)}</code></summary>"
        f'<div id="{escape(name)}">{_schema(schema)}</div></details>'
        for name, schema in document["components"]["schemas"].items()
    )
    groups = "".join(f"<h2>{escape(tag)}</h2>{''.join(each)}" for tag, each in tags.items())
    title = escape(f"{info['title']} {info['version']}")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f"{head}<h1>{title}</h1>{groups}<h2>types</h2>{schemas}</html>".encode()


def _operation(method: str, path: str, operation: dict) -> str:
    body = operation.get("requestBody", {}).get("content", {})
    request = "".join(f"<p>Body: {_type(each['schema'])}</p>" for each in body.values())
    responses = "".join(
        f"<tr><th>{escape(code)}</th><td>{escape(each['description'])}</td>"
        f"<td>{escape(', '.join(each.get('content', ())))}</td></tr>"
        for code, each in operation["responses"].items()
    )
    title = f'<span class="method">{method.upper()}</span><code>{escape(path)}</code>'
    return (
        f"<details><summary>{title}<p>{escape(operation['summary'])}</p></summary>"
        f"<div><p>{escape(operation['description'])}</p>{request}<table>{responses}</table></div></details>"
    )


def _schema(schema: dict) -> str:
    text = f"<p>{escape(schema.get('description', ''))}</p>"
    if "properties" not in schema:
        return text + f"<p>{_type(schema)}</p>"
    required = schema.get("required", ())
    rows = []
    for name, each in schema["properties"].items():
        note = "required" if name in required else ""
        words = " ".join(filter(None, (note, escape(each.get("description", "")))))
        rows.append(f"<tr><th>{escape(name)}</th><td>{_type(each)}</td><td>{words}</td></tr>")
    return f"{text}<table>{''.join(rows)}</table>"


def _type(schema: dict) -> str:
    """A schema in a few words of HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}"><code>{name}</code></a>'
    for union in ("anyOf", "oneOf"):
        if union in schema:
            return " or ".join(_type(each) for each in schema[union])
    if "enum" in schema:
        return " or ".join(f"<code>{escape(_literal(value))}</code>" for value in schema["enum"])
    kind = schema.get("type", "anything")
    if kind == "array":
        return f"list of ({_type(schema['items'])})" if "items" in schema else "list"
    text = escape(" or ".join(kind) if isinstance(kind, list) else kind)
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[name]}" for name, sign in bounds.items() if name in schema]
    return f"{text} {escape(', '.join(limits))}".strip()


def _literal(value) -> str:
    return msgspec.json.encode(value).decode()
