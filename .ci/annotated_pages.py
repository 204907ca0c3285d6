"""Quarto's code annotations where smalldocs builds the site: it leaves `# <1>` at the end of a line as it is. Here it
becomes a number in a circle, which the numbered list below the code explains, as on the site that Quarto builds."""

import re

COMMENT = re.compile(r'<span class="co"># &lt;(\d+)&gt;</span>')


def with_numbers(site):
    "Put numbers in the place of the comments, into all pages that have some."
    for page in site.rglob("*.html"):
        text, changed = COMMENT.subn(r'<span class="annotation-number">\1</span>', page.read_text(encoding="utf-8"))
        if changed:
            page.write_text(text, encoding="utf-8")
