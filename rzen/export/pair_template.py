"""A re-ranker's prompt as a Jinja chat template, for libraries that render a pair as a conversation.

A conversation is one pair. It has a message of the role `query` and one of the role `document`. A message of the role
`system` is the instruction. sentence-transformers and vLLM name the roles so. Visuals come before the text of their
message, whatever their place in it.
"""

from __future__ import annotations

import json

from rzen.config import PairTemplateName
from rzen.families import Family
from rzen.inputs.prompts import IM_END, IM_START, PADS, VISION_END, VISION_START
from rzen.reranking.prompts import PAIR_TEMPLATES

_SIDES = """\
{%- set system = namespace(text='') %}
{%- set query = namespace(visuals='', text='') %}
{%- set document = namespace(visuals='', text='') %}
{%- for message in messages %}
    {%- set side = namespace(visuals='', text='') %}
    {%- if message['content'] is string %}
        {%- set side.text = message['content'] %}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if 'text' in part %}
                {%- set side.text = side.text ~ (' ' if side.text else '') ~ part['text'] %}
            {%- elif part['type'] in ['image', 'image_url'] %}
                {%- set side.visuals = side.visuals ~ IMAGE %}
            {%- elif part['type'] in ['video', 'video_url'] %}
                {%- set side.visuals = side.visuals ~ VIDEO %}
            {%- else %}
                {{- raise_exception('a query or document has texts, images and videos') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message['role'] == 'query' %}
        {%- set query.visuals = side.visuals %}
        {%- set query.text = side.text %}
    {%- elif message['role'] == 'document' %}
        {%- set document.visuals = side.visuals %}
        {%- set document.text = side.text %}
    {%- elif message['role'] == 'system' %}
        {%- set system.text = side.text %}
    {%- else %}
        {{- raise_exception('a pair has messages of the roles query, document and system, its instruction') }}
    {%- endif %}
{%- endfor %}
"""
_IN_OPENING = """\
{{- START ~ OPENING[0] ~ (system.text or DEFAULT) ~ OPENING[1] }}
{{- query.visuals ~ (query.text if query.visuals or query.text else EMPTY) }}
"""
_BEFORE_TEXT = """\
{{- START ~ OPENING[0] }}
{%- set words = (system.text ~ ' ' ~ query.text) | trim %}
{{- query.visuals ~ (words if query.visuals or words else EMPTY) }}
"""
_END = """\
{{- MIDDLE ~ document.visuals ~ (document.text if document.visuals or document.text else EMPTY) ~ END }}"""


def pair_chat_template(name: PairTemplateName, family: Family) -> str:
    """Return the chat template of a re-ranker's prompt. tests/parity/test_export_reranker.py compares the scores.

    If the family writes times, transformers' processor puts its own marks around each temporal patch of a video.
    """
    template = PAIR_TEMPLATES[name]
    opening = template.opening.split("{instruction}")
    values = {
        "IMAGE": VISION_START + PADS["image"] + VISION_END,
        "VIDEO": PADS["video"] if family.timestamps else VISION_START + PADS["video"] + VISION_END,
        "START": f"{IM_START}system\n{template.system}{IM_END}\n{IM_START}user\n",
        "OPENING": opening,
        "DEFAULT": template.default_instruction,
        "MIDDLE": template.middle,
        "EMPTY": template.empty,
        "END": f"{IM_END}\n{IM_START}assistant\n",
    }
    constants = "".join(f"{{%- set {name} = {json.dumps(value)} %}}\n" for name, value in values.items())
    return constants + _SIDES + (_IN_OPENING if len(opening) == 2 else _BEFORE_TEXT) + _END
