// What if: latency, memory, accuracy and cost for what the reader chooses. Data: the JSON in #whatif-data (whatif.py).
// The formulas are those of roofline.py and cost.py; a test holds the two against each other.
"use strict";
(() => {
  const { models, catalog, bandwidth, defaults } = JSON.parse(document.getElementById("whatif-data").textContent);
  const HOURS = 730, DAYS = HOURS / 24;
  const form = document.getElementById("whatif-form");
  const table = document.getElementById("whatif-table");
  const note = document.getElementById("whatif-note");
  const box = document.getElementById("whatif-export");
  const field = (name) => form.elements.namedItem(name);
  const hosted = catalog.models.map((m) => ({ ...m, name: `${m.provider} ${m.model}` }));
  const history = []; // every selection, with its time: user_selections

  const fill = (name, options) => field(name).replaceChildren(...options.map((o) => new Option(o, o)));
  fill("model", models.map((m) => m.name));
  fill("compare", [...models, ...hosted].map((m) => m.name));
  fill("hardware", catalog.hardware.map((h) => h.name));
  for (const [name, value] of Object.entries(defaults)) field(name).value = value;
  field("usd_per_hour").value = catalog.hardware[0]?.usd_per_hour ?? 0;

  const line = (l, sequences, tokens, pairs) => l.fixed + sequences * l.per_sequence + tokens * l.per_token + pairs * l.per_pair;

  function times(model, s) {
    const r = model.roofline, hardware = catalog.hardware.find((h) => h.name === s.hardware);
    const faster = hardware?.bandwidth_bytes_per_s && bandwidth ? hardware.bandwidth_bytes_per_s / bandwidth : 1;
    const first = line(r.ttft, s.batch, s.batch * s.prompt, (s.batch * s.prompt ** 2) / 2);
    const each = line(r.tpot, s.batch, 0, s.batch * (s.prompt + s.output / 2));
    return { ttft_s: first / faster, tpot_s: each / faster, scaled: faster !== 1 };
  }

  function own(model, s) {
    const { ttft_s, tpot_s, scaled } = times(model, s);
    const e2e_s = ttft_s + tpot_s * (s.output - 1);
    const rate = (s.batch / e2e_s) * s.utilization;
    const machines = Math.max(1, Math.ceil(s.requests_per_day / 86400 / rate - 1e-9));
    const cache = model.roofline.kv_bytes_per_token * (s.prompt + s.output) * s.batch;
    return {
      name: model.name, ttft_s, tpot_s, e2e_s, scaled, machines, tokens_per_s: (s.batch * s.output) / e2e_s, perplexity_increase: model.perplexity_increase, kl: model.kl,
      memory_bytes: model.peak_memory_bytes === null ? null : model.peak_memory_bytes - model.measured_kv_bytes + cache,
      per_month: machines * s.usd_per_hour * HOURS, per_million_output_tokens: (s.usd_per_hour / (3600 * rate * s.output)) * 1e6, requests_per_machine_day: rate * 86400,
    };
  }

  function rented(model, s) {
    const each = (s.prompt * model.input_per_million + s.output * model.output_per_million) / 1e6;
    return { name: model.name, per_month: each * s.requests_per_day * DAYS, per_request: each, per_million_output_tokens: (each / s.output) * 1e6, updated: model.updated };
  }

  const digits = (x, n = 3) => (x === 0 ? "0" : Number(x.toPrecision(n)).toLocaleString("en", { maximumFractionDigits: 8 })).replace("-", "−");
  const cents = { minimumFractionDigits: 2, maximumFractionDigits: 2 }, small = { maximumSignificantDigits: 2 };
  const money = (x) => (x < 0 ? "−" : "") + "US$ " + Math.abs(x).toLocaleString("en", x !== 0 && Math.abs(x) < 1 ? small : cents);
  const time = (x) => (Math.abs(x) < 1 ? `${digits(1e3 * x)} ms` : `${digits(x)} s`);
  const share = (x) => `${x > 0 ? "+" : ""}${digits(100 * x)} %`;
  const size = (x) => (Math.abs(x) < 1e9 ? `${digits(x / 1e6)} MB` : `${digits(x / 1e9)} GB`);
  const rows = [
    ["First token", "ttft_s", time], ["Time per token", "tpot_s", time], ["Whole answer", "e2e_s", time], ["Tokens/s of one machine", "tokens_per_s", digits], ["Peak memory", "memory_bytes", size],
    ["Perplexity", "perplexity_increase", share], ["KL divergence", "kl", digits], ["Machines", "machines", digits], ["Per month", "per_month", money], ["Per million generated tokens", "per_million_output_tokens", money],
  ];

  function selections() {
    const s = Object.fromEntries(new FormData(form));
    for (const name of ["usd_per_hour", "batch", "prompt", "output", "requests_per_day", "utilization"]) s[name] = Number(s[name]);
    return s;
  }

  function remarks(s, a, b) {
    const model = models.find((m) => m.name === s.model), seen = model.roofline.measured, error = model.roofline.error;
    const said = [];
    if (error.tpot !== null) said.push(`Held-out error of the time model: ${digits(100 * error.tpot, 2)} % per token, ${digits(100 * error.ttft, 2)} % to the first.`);
    const beyond = ["batch", "prompt", "output"].filter((k) => s[k] > seen[k][1] || s[k] < seen[k][0]);
    if (beyond.length) said.push(`Beyond what was measured: ${beyond.map((k) => `${k} ${s[k]} (measured ${seen[k].join(" to ")})`).join(", ")}.`);
    if (a.scaled) said.push("Times on this hardware are those measured here scaled by memory bandwidth: a guess until measured there.");
    const memo = catalog.hardware.find((h) => h.name === s.hardware)?.note;
    if (memo) said.push(`${s.hardware}: ${memo}.`);
    if (b.per_request !== undefined) {
      const needed = b.per_request > 0 ? (s.usd_per_hour * 24) / b.per_request : Infinity;
      said.push(needed <= a.requests_per_machine_day ? `One machine pays for itself from ${digits(needed)} requests a day.` : "At this speed and price, paying by the token is cheaper at any traffic.");
      said.push(`Prices of ${b.updated ?? "an unknown date"}; the two models do not answer alike, so this compares cost only.`);
    }
    return said.join(" ");
  }

  function update() {
    if (!form.checkValidity()) { note.textContent = "Some fields hold no number in their range."; return; }
    const s = selections();
    const a = own(models.find((m) => m.name === s.model), s);
    const other = models.find((m) => m.name === s.compare);
    const b = other ? own(other, s) : rented(hosted.find((m) => m.name === s.compare), s);
    table.querySelector("[data-column=own]").textContent = a.name;
    table.querySelector("[data-column=other]").textContent = b.name;
    const delta = {};
    table.tBodies[0].replaceChildren(...rows.map(([label, key, write]) => {
      const row = document.createElement("tr"), head = document.createElement("th");
      head.scope = "row"; head.textContent = label;
      const known = (x) => x !== null && x !== undefined && Number.isFinite(x);
      if (known(a[key]) && known(b[key])) delta[key] = a[key] - b[key];
      const cells = [a[key], b[key], delta[key]].map((x) => Object.assign(document.createElement("td"), { textContent: known(x) ? write(x) : "–" }));
      row.dataset.key = key; row.append(head, ...cells);
      return row;
    }));
    note.textContent = remarks(s, a, b);
    history.push({ at: new Date().toISOString(), ...s });
    const record = { user_selections: s, selection_history: history.slice(-50), calculated_monthly_cost: { choice: a.per_month, compared_with: b.per_month }, comparison_delta: delta };
    box.querySelector("code").textContent = JSON.stringify(record, null, 2);
  }

  box.querySelector("button").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([box.querySelector("code").textContent], { type: "application/json" }));
    link.download = "lowbit-what-if.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });
  field("hardware").addEventListener("change", () => {
    const price = catalog.hardware.find((h) => h.name === field("hardware").value)?.usd_per_hour;
    if (price !== undefined) field("usd_per_hour").value = price;
  });
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = table.hidden = box.hidden = false;
  update();
})();
