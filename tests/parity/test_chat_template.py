"""Chat templates give the text that transformers gives."""

import json

import pytest

from gqa.data.chat_template import ChatTemplate

chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")

TEMPLATES = {
    "llama_3": """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start|>' + message['role'] + '<|end|>\n\n'+ message['content'] | trim + '<eot>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}""",
    "tools_and_namespace": """{%- set ns = namespace(found=false) -%}
{%- if tools is not none %}{{ tools | tojson }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{%- set ns.found = true %}{%- endif %}
    {%- if loop.index > 3 %}{%- break %}{%- endif %}
    {{- message.content.strip() ~ {'role': message.role, 'é': [1]} | tojson }}
{%- endfor %}
{{ ns.found }}""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}
{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}""",
    "dates": "{% if strftime_now is defined %}now{% else %}never{% endif %}{{ messages[1:] | length }}",
}
MESSAGES = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "hi\n"},
    {"role": "assistant", "content": "yo <b>"},
    {"role": "user", "content": "é"},
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_the_text_of_a_conversation(tmp_path, name, prompt):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATES[name], "bos_token": "<s>", "eos_token": "</s>"})
    )
    found = ChatTemplate(tmp_path, {"<s>": 1, "</s>": 2}).render(MESSAGES, prompt)
    expected = chat_template_utils.render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
    )[0][0]
    # The date of the day would make records differ from day to day: ours has none, as an old transformers.
    assert found == expected.replace("now", "never") if name == "dates" else found == expected
