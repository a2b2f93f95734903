"""ChatML text of a conversation: the Jinja template, and the same in plain Python."""

import json


def dumps(x):
    """JSON as the chat template writes it."""
    return json.dumps(x, ensure_ascii=False)


CHAT_TEMPLATE = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\nYou may call these functions:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\nTo call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.content %}
            {{- message.content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for call in message.tool_calls %}
                {%- if call.function %}
                    {%- set call = call.function %}
                {%- endif %}
                {%- if not loop.first or message.content %}
                    {{- '\\n' }}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
                {%- if call.arguments is string %}
                    {{- call.arguments }}
                {%- else %}
                    {{- call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def render(messages, tools=None, add_generation_prompt=False):
    """The same text as CHAT_TEMPLATE gives (checked by `python -m training tokenizer`)."""
    out, ms = [], list(messages)
    if tools:
        sysm = ms.pop(0)["content"] + "\n\n" if ms[0]["role"] == "system" else ""
        out.append(
            "<|im_start|>system\n"
            + sysm
            + "# Tools\nYou may call these functions:\n<tools>"
            + "".join("\n" + dumps(t) for t in tools)
            + '\n</tools>\nTo call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call><|im_end|>\n'
        )
    for m in ms:
        if m["role"] == "tool":
            out.append(f"<|im_start|>user\n<tool_response>\n{m['content']}\n</tool_response><|im_end|>\n")
            continue
        c = m["content"] or ""
        for t in m.get("tool_calls") or []:
            f = t["function"]
            c += (
                "\n" if c else ""
            ) + f'<tool_call>\n{{"name": "{f["name"]}", "arguments": {dumps(f["arguments"])}}}\n</tool_call>'
        out.append(f"<|im_start|>{m['role']}\n{c}<|im_end|>\n")
    return "".join(out) + ("<|im_start|>assistant\n" if add_generation_prompt else "")
