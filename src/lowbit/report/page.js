// The picture of speed against accuracy, and the copy buttons. Data: the JSON in #data (view.py, _chart).
// Colours are the variables of page.css, so light, dark and print need no redrawing.
"use strict";
(() => {
  const { points, limit } = JSON.parse(document.getElementById("data").textContent);
  const box = document.getElementById("chart");
  const color = (name) => `var(--${name})`;
  const ink = { original: color("ink"), chosen: color("accent"), ok: color("ok"), out: color("out") };
  const fill = { original: 0.2, chosen: 0.55, ok: 0.3, out: 0.12 };
  const family = getComputedStyle(document.body).fontFamily;
  const order = ["out", "ok", "original", "chosen"]; // the last is drawn on top
  const heaviest = Math.max(...points.map((p) => p.bytes || 0), 1);

  const raised = (n) => "⁻" + [...String(-n)].map((d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]).join("");
  const axisNumber = (v) => String(+v.toPrecision(3)).replace("-", "−");
  const decadeNumber = (v) => (v < 0.999e-2 ? "10" + raised(Math.round(Math.log10(v))) : axisNumber(v));

  // Where the y axis ends. What is far above the limit would press everything else onto the floor: it is drawn at the
  // top edge, as an arrow.
  function range(measure, shown) {
    if (measure === "kl") {
      const positive = shown.map((p) => p.kl).filter((v) => v > 0);
      const decade = (v, round) => 10 ** round(Math.log10(v));
      if (!positive.length) return { log: true, min: 1e-6, max: 1 };
      return { log: true, min: decade(Math.min(...positive) / 1.5, Math.floor), max: decade(Math.max(...positive) * 1.5, Math.ceil) };
    }
    const tops = shown.map((p) => p.ppl + p.ppl_error);
    const low = Math.min(0, ...shown.map((p) => p.ppl - p.ppl_error));
    const cap = limit ? 6 * limit : Infinity;
    const high = Math.max(Math.min(Math.max(...tops), cap), (limit || 0) * 1.35, 0.01);
    return { log: false, min: low - 0.06 * (high - low), max: high + 0.1 * (high - low) };
  }

  function tip({ data }) {
    const element = document.createElement("div");
    element.className = "tip";
    element.append(Object.assign(document.createElement("b"), { textContent: data.point.name }));
    for (const words of data.point.words) {
      const row = document.createElement("div");
      row.append(...words.map((textContent) => Object.assign(document.createElement("span"), { textContent })));
      element.append(row);
    }
    return element; // text only: nothing in a name is ever read as HTML
  }

  function option(measure) {
    const narrow = box.clientWidth < 560;
    const shown = points.filter((p) => p[measure] !== null).sort((a, b) => order.indexOf(a.kind) - order.indexOf(b.kind));
    const y = range(measure, shown);
    const xs = shown.map((p) => p.x);
    const slowest = Math.max(...xs), fastest = Math.min(...xs);
    const x = { min: fastest > 0.6 * slowest ? fastest - 0.35 * (slowest - fastest) - 0.02 * slowest : 0, max: slowest + 0.12 * (slowest - Math.min(fastest, 0.6 * slowest)) };
    const place = (p) => [p.x, Math.min(Math.max(p[measure], y.min), y.max)];
    const beyond = (p) => p[measure] > y.max;
    const original = points.find((p) => p.kind === "original");
    const text = { color: color("soft"), fontSize: 12 };
    const axis = {
      axisLine: { show: true, lineStyle: { color: color("line") } }, axisTick: { show: false }, splitLine: { lineStyle: { color: color("grid") } },
      nameTextStyle: text,
    };
    const labels = (ends, formatter) => ({ axisLabel: { ...text, formatter, hideOverlap: true, showMinLabel: ends, showMaxLabel: ends } });
    const symbols = shown.map((p) => ({
      point: p, value: place(p), name: p.name,
      symbol: beyond(p) ? "triangle" : p.kind === "original" ? "diamond" : p.elsewhere ? "rect" : "circle",
      symbolSize: beyond(p) ? 12 : Math.max(10, (narrow ? 32 : 44) * Math.sqrt((p.bytes || heaviest / 4) / heaviest)),
      itemStyle: { color: `color-mix(in srgb, ${ink[p.kind]} ${100 * fill[p.kind]}%, transparent)`, borderColor: ink[p.kind], borderWidth: 1.5, opacity: 1 },
      emphasis: { itemStyle: { color: `color-mix(in srgb, ${ink[p.kind]} ${100 * fill[p.kind]}%, transparent)`, borderColor: ink[p.kind], borderWidth: 2.5 } },
      caption: p.name + (beyond(p) ? ` (${p.words[1][1].split(" (")[0]})` : ""),
    }));
    const whiskers = shown.filter((p) => p[`${measure}_error`] > 0 && !beyond(p)).map((p) => [p.x, Math.max(p[measure] - p[`${measure}_error`], y.min), Math.min(p[measure] + p[`${measure}_error`], y.max), ink[p.kind]]);
    const quiet = { silent: true, tooltip: { show: false }, animation: false };
    return {
      animation: false, textStyle: { fontFamily: family },
      grid: { left: 8, right: 12, top: 34, bottom: 30, outerBoundsMode: "same", outerBoundsContain: "axisLabel" },
      tooltip: { trigger: "item", formatter: tip, confine: true, backgroundColor: color("paper"), borderColor: color("line"), padding: [8, 12], extraCssText: "border-radius:8px" },
      xAxis: { type: "value", ...axis, ...labels(false, axisNumber), ...x, name: "time per token (ms)", nameLocation: "middle", nameGap: 30, splitLine: { show: false } },
      yAxis: { type: y.log ? "log" : "value", ...axis, ...labels(y.log, y.log ? decadeNumber : axisNumber), min: y.min, max: y.max, name: measure === "kl" ? "KL divergence (nats)" : "perplexity increase (%)", nameLocation: "end", nameTextStyle: { ...text, align: "left", padding: [0, 0, 0, -8] }, nameGap: 14 },
      series: [
        { type: "line", name: "Pareto set", data: shown.filter((p) => p.pareto).sort((a, b) => a.x - b.x).map(place), symbol: "none", lineStyle: { color: color("ok"), type: "dashed", width: 1.5, opacity: 0.8 }, z: 2, ...quiet },
        { type: "custom", name: "interval", data: whiskers, z: 3, ...quiet, encode: { x: 0, y: [1, 2] }, renderItem: whisker },
        {
          type: "scatter", name: "models", data: symbols, z: 4, emphasis: { scale: 1.08 },
          markArea: measure === "ppl" && limit !== null && original ? { ...quiet, itemStyle: { color: color("tint"), opacity: 0.65 }, label: { ...text, show: !narrow, position: "insideTopLeft", distance: 8 }, data: [[{ name: "faster, within the limit", xAxis: x.min, yAxis: limit }, { xAxis: original.x, yAxis: y.min }]] } : undefined,
          markLine: measure === "ppl" && limit !== null ? { ...quiet, symbol: "none", lineStyle: { color: color("bad"), type: "solid", width: 1.5 }, label: { ...text, color: color("bad"), position: "insideEndTop", formatter: `limit +${+limit.toPrecision(4)} %` }, data: [{ yAxis: limit }] } : undefined,
        },
      ],
    };
  }

  // A name stands where it hides nothing: right, left, above or below its point. Without room it is left to the tooltip.
  function name(chart, symbols) {
    const [width, height, tall, gap] = [box.clientWidth, box.clientHeight, 16, 6];
    const ruler = document.createElement("canvas").getContext("2d");
    const pixels = symbols.map((s) => chart.convertToPixel({ seriesName: "models" }, s.value));
    const taken = symbols.map((s, i) => [pixels[i][0] - s.symbolSize / 2, pixels[i][1] - s.symbolSize / 2, pixels[i][0] + s.symbolSize / 2, pixels[i][1] + s.symbolSize / 2]);
    const free = ([x0, y0, x1, y1], own) => x0 >= 0 && x1 <= width && y0 >= 0 && y1 <= height && taken.every((t, i) => i === own || x1 <= t[0] || x0 >= t[2] || y1 <= t[1] || y0 >= t[3]);
    for (let i = symbols.length - 1; i >= 0; i--) {
      const { caption, symbolSize, point } = symbols[i], [x, y] = pixels[i], reach = symbolSize / 2 + gap;
      ruler.font = `${point.kind === "chosen" ? 650 : 400} 12.5px ${family}`;
      const wide = ruler.measureText(caption).width + 2;
      const boxes = {
        right: [x + reach, y - tall / 2, x + reach + wide, y + tall / 2], left: [x - reach - wide, y - tall / 2, x - reach, y + tall / 2],
        top: [x - wide / 2, y - reach - tall, x + wide / 2, y - reach], bottom: [x - wide / 2, y + reach, x + wide / 2, y + reach + tall],
      };
      const position = Object.keys(boxes).find((side) => free(boxes[side], i));
      if (position) taken.push(boxes[position]);
      symbols[i].label = {
        show: Boolean(position), position: position || "right", distance: gap, formatter: () => caption, fontSize: 12.5, fontWeight: point.kind === "chosen" ? 650 : 400,
        color: point.kind === "out" ? color("soft") : ink[point.kind], textBorderColor: color("paper"), textBorderWidth: 3,
      };
    }
    return symbols;
  }

  function whisker(_, api) {
    const [x, low] = api.coord([api.value(0), api.value(1)]);
    const high = api.coord([api.value(0), api.value(2)])[1];
    const line = (x1, y1, x2, y2) => ({ type: "line", shape: { x1, y1, x2, y2 }, style: { stroke: api.value(3), lineWidth: 1.5 } });
    return { type: "group", children: [line(x, low, x, high), line(x - 5, low, x + 5, low), line(x - 5, high, x + 5, high)] };
  }

  if (box) {
    const chart = echarts.init(box, null, { renderer: "svg" });
    const measures = ["ppl", "kl"].filter((m) => points.some((p) => p[m] !== null && p.kind !== "original"));
    const choice = document.querySelector(".choice");
    let measure = measures[0] || "ppl";
    const draw = () => {
      chart.resize();
      const picture = option(measure);
      chart.setOption(picture, true);
      chart.setOption({ series: [{ name: "models", data: name(chart, picture.series.at(-1).data) }] });
      const svg = box.querySelector("svg"); // a picture that is printed is scaled to the paper
      svg.setAttribute("viewBox", `0 0 ${chart.getWidth()} ${chart.getHeight()}`);
    };
    if (measures.length > 1) {
      choice.hidden = false;
      choice.addEventListener("change", (event) => { measure = event.target.value; draw(); });
    }
    draw();
    let width = box.clientWidth;
    new ResizeObserver(() => {
      if (box.clientWidth && box.clientWidth !== width && !matchMedia("print").matches) { width = box.clientWidth; draw(); }
    }).observe(box);
  }

  if (navigator.clipboard) {
    for (const button of document.querySelectorAll(".copy")) {
      button.hidden = false;
      button.addEventListener("click", async () => {
        await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      });
    }
  }
})();
