"""A model's prompt as a Jinja chat template, for libraries that render conversations.

A conversation is one input. It has at most one system message, whose text is the instruction, and one user message
with visuals and text. Visuals come first, whatever their place in the message. The template refuses what it cannot
render as it was trained.
"""

from __future__ import annotations

import json

from rzen.config import ModelIdentity
from rzen.families import Family
from rzen.inputs.prompts import IM_END, IM_START, PADS, TEMPLATES, VISION_END, VISION_START, ending, render

FILE = "chat_template.jinja"

_PARTS = """\
{%- set side = namespace(instruction='', visuals='', text='') %}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user'] %}
        {{- raise_exception('an input has a system message, its instruction, and a user message') }}
    {%- endif %}
    {%- set words = namespace(text='') %}
    {%- if message['content'] is string %}
        {%- set words.text = message['content'] | trim %}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if 'text' in part %}
                {%- set words.text = (words.text ~ ' ' ~ part['text']) | trim %}
            {%- elif part['type'] in ['image', 'image_url'] %}
                {%- set side.visuals = side.visuals ~ IMAGE %}
            {%- elif part['type'] in ['video', 'video_url'] %}
                ON_VIDEO
            {%- else %}
                {{- raise_exception('an input has texts, images and videos') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message['role'] == 'system' %}
        {%- set side.instruction = words.text %}
    {%- else %}
        {%- set side.text = words.text %}
    {%- endif %}
{%- endfor %}
"""
_NO_INSTRUCTION = """\
{%- if side.instruction %}
    {{- raise_exception('the vector is the mean of all tokens but those of the instruction: only rzen can take one') }}
{%- endif %}
"""
_END = """\
{%- set suffix = VISUAL_SUFFIX if side.visuals else TEXT_SUFFIX %}
{{- START ~ side.visuals }}
{{- [side.instruction, side.text, suffix] | select | join(' ') }}
{{- END }}"""


def chat_template(identity: ModelIdentity, family: Family) -> str:
    """Return the template of an identity's prompt. tests/parity/test_export.py compares it with `Processor.pieces`.

    If the family writes times, transformers' processor puts its own marks around each temporal patch of a video.
    """
    template = TEMPLATES[identity.prompt.template]
    image = VISION_START + PADS["image"] + VISION_END
    video = PADS["video"] if family.timestamps else VISION_START + PADS["video"] + VISION_END
    system = f"{IM_START}system\n{template.system}{IM_END}\n" if template.system else ""
    on_video = "{%- set side.visuals = side.visuals ~ VIDEO %}"
    if template.frame_tokens:
        low, high = template.frame_tokens
        on_video = f"{{{{- raise_exception('a video is read as images of {low} to {high} tokens: only rzen does') }}}}"
    values = {
        "VISUAL_SUFFIX": template.visual_suffix,
        "TEXT_SUFFIX": template.text_suffix,
        "IMAGE": image,
        "VIDEO": video,
        "START": f"{system}{IM_START}user\n",
        "END": f"{IM_END}\n{render(ending(template))}",
    }
    constants = "".join(f"{{%- set {name} = {json.dumps(value)} %}}\n" for name, value in values.items())
    refusal = _NO_INSTRUCTION if identity.readout.pooling == "mean" else ""
    return constants + _PARTS.replace("ON_VIDEO", on_video) + refusal + _END
