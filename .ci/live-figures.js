// Each live figure of a page: its picture gives way to its chart, which answers to sliders, menus and the pointer.
// The chart is as wide as its column; on a phone, views that stand side by side are put below each other.
(() => {
  const NARROW = 560;

  const parts = (spec) => spec.hconcat ?? spec.vconcat ?? spec.concat ?? (spec.spec ? [spec.spec] : []);
  const views = (spec) => (parts(spec).length ? parts(spec).flatMap(views) : [spec]);

  // the views below each other, and all as wide as the widest
  function stack(spec) {
    if (spec.hconcat) {
      spec.vconcat = spec.hconcat;
      delete spec.hconcat;
    }
    if (spec.concat || spec.spec) spec.columns = 1;
    parts(spec).forEach(stack);
  }

  function level(spec) {
    const sized = views(spec).filter((view) => typeof view.width === "number");
    const widest = Math.max(...sized.map((view) => view.width));
    sized.forEach((view) => { view.width = widest; });
  }

  // so many pixels more, shared by what stands side by side
  function widen(spec, pixels) {
    const beside = spec.hconcat?.length ?? spec.columns ?? 1;
    if (parts(spec).length) parts(spec).forEach((part) => widen(part, pixels / beside));
    else if (typeof (spec.width ?? 300) === "number") spec.width = Math.max(80, (spec.width ?? 300) + pixels);
  }

  async function draw(figure) {
    const spec = JSON.parse(figure.querySelector("script").textContent);
    const column = figure.clientWidth;
    spec.background = null;
    if (column < NARROW) {
      stack(spec);
      level(spec);
      spec.config.legend = { ...spec.config.legend, columns: 2 };
    }
    const chart = document.createElement("div");
    const place = figure.querySelector(".live-chart, img");
    chart.className = "live-chart";
    chart.style.visibility = "hidden";
    place.before(chart);
    const options = { actions: false, renderer: "svg", tooltip: { theme: "live" } };
    let drawn = await vegaEmbed(chart, spec, options);
    for (let tries = 0; tries < 3; tries++) {
      const missing = column - Number(chart.querySelector("svg").getAttribute("width"));
      if (missing >= 0 && missing < 3) break;
      widen(spec, Math.floor(missing - 1));
      drawn.finalize();
      drawn = await vegaEmbed(chart, spec, options);
    }
    place.remove();
    chart.style.visibility = "";
    figure.dataset.column = column;
  }

  const figures = () => [...document.querySelectorAll("figure.live-figure")];
  let waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    const resized = () => figures().filter((figure) => figure.clientWidth !== Number(figure.dataset.column));
    waiting = setTimeout(() => resized().forEach(draw), 300);
  });
  figures().forEach(draw);
})();
