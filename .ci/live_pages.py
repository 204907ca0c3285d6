"""The site's part of live figures (see nbs/explore/live_figure.ipynb): a chart in a notebook's output becomes a picture
in the page, with its specification beside it, and a script puts the chart in the place of the picture.

The specifications go into the pages after these are rendered: the builders would take them for text to search in.
"""

import base64
import html
import json
import os
import re
from pathlib import Path

CHART = "application/vnd.vegalite.v5+json"  # VEGA_LITE_TYPE of sgd_sai.explore.live_figure, which needs Altair
SCRIPT = Path(__file__).with_name("live-figures.js")
FIGURE = re.compile(r'<figure\b[^>]*\bdata-chart="(\d+)"[^>]*>')  # Quarto adds classes
VEGA_LITE = re.compile(r"/v(\d+\.\d+)[.\d]*\.json")


def with_pictures(notebook, charts):
    "Put a picture in the place of each chart of a notebook, and its specification into the list `charts`."
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if CHART in data:
                output["data"] = {"text/markdown": picture(data[CHART], data["image/png"], len(charts))}
                charts.append(data[CHART])


def picture(chart, png, number):
    "The figure as Markdown with HTML in it: an output of the type text/html would load scripts from elsewhere."
    png = "".join(png).replace("\n", "")
    width = int.from_bytes(base64.b64decode(png[:64])[16:20], "big") // 2  # two dots of the picture to a pixel
    alt = html.escape(chart["description"])
    image = f'<img src="data:image/png;base64,{png}" alt="{alt}" width="{width}">'
    return f'```{{=html}}\n<figure class="live-figure" data-chart="{number}">{image}</figure>\n```\n'


def with_charts(site, charts):
    "Put specifications and scripts into the rendered pages that have live figures, and the scripts into the site."
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")} if charts else {}
    for page, text in pages.items():
        if not FIGURE.search(text):
            continue
        text = FIGURE.sub(lambda figure: figure[0] + specification(charts[int(figure[1])]), text)
        folder = os.path.relpath(site, page.parent).replace(os.sep, "/")
        tags = [f'<script defer src="{folder}/live-figures/{name}"></script>' for name in ("vega.js", SCRIPT.name)]
        page.write_text(text.replace("</body>", "\n".join([*tags, "</body>"])), encoding="utf-8")
    if charts:
        write_scripts(site / "live-figures", VEGA_LITE.search(charts[0]["$schema"])[1])


def specification(chart):
    "A chart as a script that is not run. No text in it can end the script."
    text = json.dumps(chart, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json">{text}</script>'


def write_scripts(folder, version):
    "Vega, Vega-Lite of this version and Vega-Embed in one file, and the script that uses them."
    import vl_convert

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vega.js").write_text(vl_convert.javascript_bundle(vl_version=version), encoding="utf-8")
    (folder / SCRIPT.name).write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
