"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const names = Object.keys(data.projections);
  const pick = document.getElementById("pick");
  const W = 640, H = 360, L = 64, R = 40, T = 16, B = 44;
  document.documentElement.classList.add("scripted");

  function element(name, attributes, text) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  const number = (v) => v !== 0 && (v < 1e-3 || v >= 1e5) ? v.toExponential(0) : String(Number(v.toPrecision(2)));

  function logTicks(low, high) {
    const found = [];
    const from = Math.ceil(Math.log10(low)), to = Math.floor(Math.log10(high));
    const step = Math.max(1, Math.ceil((to - from) / 6));
    for (let e = from; e <= to; e += step) found.push(10 ** e);
    return found;
  }

  // Dots, a line, or both; y is logarithmic, x if asked.
  function chart(target, title, dots, line, labels, logX, note) {
    const all = [...dots, ...line].filter((p) => p[1] > 0);
    target.replaceChildren();
    if (all.length < 2) return;
    const xs = all.map((p) => p[0]), ys = all.map((p) => p[1]);
    const x = [Math.min(...xs), Math.max(...xs)], y = [Math.min(...ys) / 1.5, Math.max(...ys) * 1.5];
    const fx = logX ? Math.log : (v) => v;
    const px = (v) => L + (fx(v) - fx(x[0])) / (fx(x[1]) - fx(x[0])) * (W - L - R);
    const py = (v) => H - B - (Math.log(v) - Math.log(y[0])) / (Math.log(y[1]) - Math.log(y[0])) * (H - T - B);
    const svg = element("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": title, class: "chart" });
    for (const tick of logTicks(y[0], y[1])) {
      svg.append(element("line", { class: "grid", x1: L, x2: W - R, y1: py(tick), y2: py(tick) }));
      svg.append(element("text", { class: "tick", x: L - 8, y: py(tick) + 4, "text-anchor": "end" }, number(tick)));
    }
    for (const tick of logX ? logTicks(x[0], x[1]) : [0, 0.2, 0.4, 0.6, 0.8]) {
      if (tick >= x[0] && tick <= x[1]) svg.append(element("text", { class: "tick", x: px(tick), y: H - B + 18, "text-anchor": "middle" }, number(tick)));
    }
    svg.append(element("text", { class: "label", x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle" }, labels[0]));
    svg.append(element("text", { class: "label", transform: `translate(14 ${(T + H - B) / 2}) rotate(-90)`, "text-anchor": "middle" }, labels[1]));
    if (line.length > 1) {
      const path = line.filter((p) => p[1] > 0).map((p) => `${px(p[0])},${py(p[1])}`).join(" ");
      svg.append(element("polyline", { points: path, fill: "none", stroke: "#c2410c", "stroke-width": 2 }));
    }
    for (const [a, b] of dots) svg.append(element("circle", { cx: px(a), cy: py(b), r: 3, fill: "#0b6bcb" }));
    if (note) svg.append(element("text", { class: "series", x: W - R, y: T + 12, "text-anchor": "end", fill: "#c2410c" }, note));
    target.append(svg);
  }

  function drawDensity(name, esd) {
    const dots = [];
    esd.density.forEach((d, i) => { if (d !== null) dots.push([10 ** (esd.low + esd.step * (i + 0.5)), d]); });
    const line = [];
    if (esd.alpha && esd.xmin) {
      const scale = esd.tail / esd.size * (esd.alpha - 1) / esd.xmin;
      for (const v of [esd.xmin, 10 ** (esd.low + esd.step * esd.density.length)]) line.push([v, scale * (v / esd.xmin) ** -esd.alpha]);
    }
    const note = esd.alpha ? `alpha ${esd.alpha.toFixed(2)}` : "";
    chart(document.getElementById("esd"), `Eigenvalue density of ${name}`, dots, line, ["eigenvalue of WᵀW", "density"], true, note);
  }

  function show(name) {
    const found = data.projections[name];
    pick.value = name;
    const parts = [name];
    if (found.shape) parts.push(found.shape);
    if (found.esd && found.esd.alpha) {
      const error = found.stderr ? ` ± ${found.stderr.toFixed(2)}` : "";
      parts.push(`alpha ${found.esd.alpha.toFixed(2)}${error} over ${found.esd.tail} of ${found.esd.size} eigenvalues`);
      if (found.ks !== null && found.ks !== undefined) parts.push(`distance ${found.ks.toFixed(3)}`);
    }
    if (found.flag) parts.push(`flag: ${found.flag}`);
    for (const [plan, sparsity] of Object.entries(found.plans)) parts.push(`${plan}: sparsity ${sparsity.toFixed(3)}`);
    document.getElementById("picked").textContent = parts.join(" · ");
    if (found.esd) drawDensity(name, found.esd);
    if (found.curve) {
      const line = found.curve.map((v, i) => [data.grid[i], v]);
      chart(document.getElementById("curve"), `Sensitivity curve of ${name}`, [], line, ["sparsity of this projection", "predicted loss"], false, "");
    }
    for (const cell of document.querySelectorAll("[data-cell]")) {
      cell.classList.toggle("chosen", cell.dataset.cell === `${found.block}/${found.kind}`);
    }
  }

  for (const name of names) pick.append(new Option(name, name));
  pick.addEventListener("change", () => show(pick.value));
  const step = (by) => show(names[(names.indexOf(pick.value) + by + names.length) % names.length]);
  document.getElementById("previous").addEventListener("click", () => step(-1));
  document.getElementById("next").addEventListener("click", () => step(1));
  const byCell = new Map(names.map((n) => [`${data.projections[n].block}/${data.projections[n].kind}`, n]));
  document.addEventListener("click", (event) => {
    const cell = event.target.closest && event.target.closest("[data-cell]");
    if (cell && byCell.has(cell.dataset.cell)) show(byCell.get(cell.dataset.cell));
  });
  show(names[0]);
})();
