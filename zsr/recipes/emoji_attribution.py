"""The words that travel with the emoji shards: who drew them, under which licence, and what each split is for."""

from __future__ import annotations

SPLIT_NOTES = {
    "train": "Training concepts in the training styles.",
    "val": "Validation concepts, never trained on, in the training styles: for selection.",
    "test_style": "Training concepts in the held-out style: never for selection.",
    "test_concepts": "Test concepts, never trained on, in the training styles: never for selection.",
    "test_both": "Test concepts in the held-out style: never for selection.",
}

_MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated documentation
files (the "Software"), to deal in the Software without restriction, including without limitation the rights to use, copy,
modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit persons to whom the Software
is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES
OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE
LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR
IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE."""

ATTRIBUTION = f"""\
# Attribution

The images in these shards are emoji drawings by five vendors, rendered from SVG to 64x64 pixels on white and re-encoded as
lossless WebP; nothing else was changed. The key of a sample begins with its style. They were taken from the npm packages of the
Iconify project, which redistribute the vendors' drawings under the vendors' own licences. No vendor endorses this use.

| style | drawings | author | licence | package |
|---|---|---|---|---|
| `noto` | [Noto Emoji](https://github.com/googlefonts/noto-emoji) | Google LLC | Apache-2.0 | `@iconify-json/noto` 1.2.9 |
| `twemoji` | [Twemoji](https://github.com/jdecked/twemoji) | Twitter, Inc and other contributors | CC-BY-4.0 | `@iconify-json/twemoji` 1.2.5 |
| `emojione` | [EmojiOne 2.3](https://github.com/EmojiTwo/emojitwo) | EmojiOne, free icons | CC-BY-4.0 | `@iconify-json/emojione` 1.2.3 |
| `fxemoji` | [Firefox OS Emoji](https://github.com/mozilla/fxemoji) | Mozilla Foundation | Apache-2.0 | `@iconify-json/fxemoji` 1.2.2 |
| `fluent` | [Fluent Emoji, flat](https://github.com/microsoft/fluentui-emoji) | Microsoft Corporation | MIT | `@iconify-json/fluent-emoji-flat` 1.2.6 |

Names and groups come from `unicode-emoji-json` 0.9.0 (MIT, Copyright (c) 2019 Mu-An Chiou; the names are those of the Unicode
CLDR), keywords in `concepts.json` from `emojilib` 4.0.3 (MIT, Copyright (c) 2014 Mu-An Chiou), subgroups from `emoji-datasource`
16.0.0 (MIT, Copyright (c) 2013 Cal Henderson; only its table was read, none of its images).

## Licence texts

- Apache-2.0: the file `LICENSE` at the root of this repository is the same text; <https://www.apache.org/licenses/LICENSE-2.0>.
- CC-BY-4.0: <https://creativecommons.org/licenses/by/4.0/legalcode>. The rendering is a change in the sense of its section 3(a).
- MIT, for `fluent` with "Copyright (c) Microsoft Corporation.", for the tables with the notices above:

{_MIT}
"""
