// The calculator of sizes.md. Bytes are those of SPEC.md §5; times are rows of benchmarks.md and kernels.md, as they stand
// there (tests/test_site.py compares both). Nothing is extrapolated.
const fwpkmSizes = {
  fields: {
    hidden_size: ["width of the model", 512],
    key_dim: ["Dk, width of a query", 256],
    value_dim: ["Dv, width of a slot", 256],
    num_heads: ["H, read heads", 1],
    num_subkeys: ["S, sub-keys; S² slots", 128],
    top_k: ["k, slots a head and token", 8],
    chunk_size: ["C, tokens per write", 512],
    lookahead: ["L", 1],
    rows: ["B, sequences at a time", 8],
    tokens: ["T, tokens of each in a call", 4096],
  },

  // All rows: Dk = Dv = 512, H = 1, k = 8, C = 512. Milliseconds; from the tables of these sections.
  measured: [
    { device: "H200, Triton kernels", page: "kernels.md", section: "On a GPU", table: "B=8 T=4096", row: "N=256², one table", rows: 8, tokens: 4096, subkeys: 256, forward: 1.43, train: 3.94 },
    { device: "H200, Triton kernels", page: "kernels.md", section: "On a GPU", table: "B=8 T=4096", row: "N=512², one table", rows: 8, tokens: 4096, subkeys: 512, forward: 1.61, train: 3.96 },
    { device: "H200, Triton kernels", page: "kernels.md", section: "On a GPU", table: "B=8 T=4096", row: "N=512², eight tables", rows: 8, tokens: 4096, subkeys: 512, forward: 1.71, train: 3.32 },
    { device: "H200, Triton kernels", page: "kernels.md", section: "On a GPU", table: "B=8 T=4096", row: "N=1024², one table", rows: 8, tokens: 4096, subkeys: 1024, forward: 1.80, train: 4.20 },
    { device: "H200, Triton kernels", page: "kernels.md", section: "On a GPU", table: "B=8 T=4096", row: "N=2048², one table", rows: 8, tokens: 4096, subkeys: 2048, forward: 2.27, train: 4.13 },
    { device: "H200, Triton kernels", page: "kernels.md", section: "On a GPU", table: "B=1", row: "T=4096 N=256²", rows: 1, tokens: 4096, subkeys: 256, forward: 2.27, train: 4.11 },
    { device: "H200, Triton kernels", page: "kernels.md", section: "On a GPU", table: "B=1", row: "T=4096 N=512²", rows: 1, tokens: 4096, subkeys: 512, forward: 1.54, train: 2.74 },
    { device: "H200, Triton kernels", page: "kernels.md", section: "On a GPU", table: "B=1", row: "T=4096 N=1024²", rows: 1, tokens: 4096, subkeys: 1024, forward: 1.34, train: 3.57 },
    { device: "H200, Triton kernels", page: "kernels.md", section: "On a GPU", table: "B=1", row: "T=4096 N=2048²", rows: 1, tokens: 4096, subkeys: 2048, forward: 1.56, train: 2.74 },
    { device: "H200, Triton kernels", page: "kernels.md", section: "On a GPU", table: "B=1", row: "T=32768 N=512²", rows: 1, tokens: 32768, subkeys: 512, forward: 7.36, train: 11.8 },
    { device: "H200, Triton kernels", page: "kernels.md", section: "On a GPU", table: "B=1", row: "T=32768 N=2048²", rows: 1, tokens: 32768, subkeys: 2048, forward: 7.05, train: 13.4 },
    { device: "H200, Triton kernels", page: "kernels.md", section: "On a GPU", table: "B=1", row: "T=131072 N=512²", rows: 1, tokens: 131072, subkeys: 512, forward: 16.5, train: 38.4 },
    { device: "H200, Triton kernels", page: "kernels.md", section: "On a GPU", table: "B=1", row: "T=131072 N=2048²", rows: 1, tokens: 131072, subkeys: 2048, forward: 16.2, train: 43.3 },
    { device: "H200, JAX without kernels", page: "benchmarks.md", section: "On a GPU", table: "step-512", row: "jax", rows: 1, tokens: 2048, subkeys: 512, forward: 1.9, train: 2.7 },
    { device: "H200, JAX without kernels", page: "benchmarks.md", section: "On a GPU", table: "shared-512", row: "jax", rows: 8, tokens: 4096, subkeys: 512, forward: 7.6, train: 11.5 },
    { device: "H200, JAX without kernels", page: "benchmarks.md", section: "On a GPU", table: "train-512", row: "jax", rows: 8, tokens: 4096, subkeys: 512, forward: 7.9, train: 12.3 },
    { device: "2 CPU cores, PyTorch", page: "benchmarks.md", section: "On the CPU", table: "step-128", row: "torch", rows: 1, tokens: 2048, subkeys: 128, forward: 47.5, train: 91.1 },
    { device: "2 CPU cores, PyTorch", page: "benchmarks.md", section: "On the CPU", table: "step-512", row: "torch", rows: 1, tokens: 2048, subkeys: 512, forward: 61.2, train: 99.9 },
    { device: "2 CPU cores, PyTorch", page: "benchmarks.md", section: "On the CPU", table: "step-1024", row: "torch", rows: 1, tokens: 2048, subkeys: 1024, forward: 75.9, train: 121.1 },
    { device: "2 CPU cores, JAX", page: "benchmarks.md", section: "On the CPU", table: "step-128", row: "jax", rows: 1, tokens: 2048, subkeys: 128, forward: 64.3, train: 128.2 },
    { device: "2 CPU cores, JAX", page: "benchmarks.md", section: "On the CPU", table: "step-512", row: "jax", rows: 1, tokens: 2048, subkeys: 512, forward: 82.5, train: 143.6 },
    { device: "2 CPU cores, JAX", page: "benchmarks.md", section: "On the CPU", table: "step-1024", row: "jax", rows: 1, tokens: 2048, subkeys: 1024, forward: 98.0, train: 166.3 },
  ],

  // Bytes of float32 tables and states; `packed` is the most that a row can take after `tokens` tokens.
  bytes({ hidden_size, key_dim, value_dim, num_heads, num_subkeys, top_k, chunk_size, lookahead, rows, tokens }) {
    const slots = num_subkeys ** 2, query = num_heads * key_dim, pending = chunk_size + lookahead - 1;
    const values = 4 * slots * value_dim, keys = 4 * query * num_subkeys;
    const state = values + keys + pending * (4 * (query + value_dim + 1) + 1) + 4;
    const weights = query * (hidden_size + 1) + value_dim * (hidden_size + 1) + (hidden_size + 1)
      + hidden_size * (value_dim + 1) + 3 * hidden_size + value_dim;
    const written = Math.min(slots, tokens * num_heads * top_k);
    return {
      values, keys, state, states: rows * state, parameters: weights,
      backward: rows * tokens * num_heads * top_k * 4 * (key_dim + value_dim),
      packed: written * (4 * value_dim + 4) + keys + pending * (4 * (query + value_dim + 1) + 1) + 1024,
    };
  },

  // What breaks a rule of FwPKMConfig, or "".
  refusal(chosen) {
    for (const [name, value] of Object.entries(chosen)) {
      const least = name === "lookahead" ? 0 : name === "value_dim" ? 2 : 1;
      if (!Number.isInteger(value) || value < least) return `${name} must be an integer of at least ${least}.`;
    }
    if (chosen.key_dim % 2) return "key_dim must be even.";
    if (chosen.top_k > chosen.num_subkeys) return "top_k must be at most num_subkeys.";
    if (chosen.lookahead >= chosen.chunk_size) return "lookahead must be less than chunk_size.";
    return "";
  },

  // The rows measured on a device, the nearest in sub-keys first, then in rows and tokens.
  nearest(device, chosen) {
    const far = (a, b) => Math.abs(Math.log2(a / b));
    const distance = (row) => 100 * far(row.subkeys, chosen.num_subkeys) + 10 * far(row.rows, chosen.rows) + far(row.tokens, chosen.tokens);
    return this.measured.filter((row) => row.device === device).sort((a, b) => distance(a) - distance(b));
  },

  text(bytes) {
    const power = bytes < 1024 ? 0 : Math.min(4, Math.floor(Math.log2(bytes) / 10));
    return `${+(bytes / 1024 ** power).toPrecision(4)} ${["bytes", "KiB", "MiB", "GiB", "TiB"][power]}`;
  },
};
window.fwpkmSizes = fwpkmSizes;

function showCalculator(element) {
  const made = (tag, parent, properties = {}) => parent.appendChild(Object.assign(document.createElement(tag), properties));
  element.replaceChildren();
  const form = made("form", element, { className: "sizes-form", onsubmit: () => false });
  const inputs = {};
  for (const [name, [label, value]] of Object.entries(fwpkmSizes.fields)) {
    const box = made("label", form);
    made("code", box, { textContent: name });
    made("small", box, { textContent: label });
    inputs[name] = made("input", box, { type: "number", name, value, step: 1 });
  }
  const box = made("label", form);
  made("code", box, { textContent: "device" });
  made("small", box, { textContent: "of the times" });
  const device = made("select", box, { name: "device" });
  for (const name of new Set(fwpkmSizes.measured.map((row) => row.device))) made("option", device, { textContent: name });
  const output = made("div", element, { className: "sizes-output" });
  output.setAttribute("aria-live", "polite");

  const line = (body, cells) => cells.reduce((row, text) => (made("td", row, { textContent: text }), row), made("tr", body));
  const table = (titles) => {
    const body = made("table", output);
    titles.reduce((row, text) => (made("th", row, { textContent: text }), row), made("tr", made("thead", body)));
    return made("tbody", body);
  };
  const update = () => {
    output.replaceChildren();
    const chosen = Object.fromEntries(Object.entries(inputs).map(([name, input]) => [name, input.valueAsNumber]));
    const refusal = fwpkmSizes.refusal(chosen);
    if (refusal) return void made("p", output, { className: "sizes-refusal", textContent: refusal });
    const size = fwpkmSizes.bytes(chosen), text = fwpkmSizes.text;
    const bytes = table(["what", "bytes"]);
    line(bytes, ["slots", (chosen.num_subkeys ** 2).toLocaleString("en")]);
    line(bytes, ["state of one row: its table, keys, pending tokens", text(size.state)]);
    line(bytes, [`states of all ${chosen.rows} rows`, text(size.states)]);
    line(bytes, [`the same row packed, at most, after ${chosen.tokens} tokens`, text(size.packed)]);
    line(bytes, ["kept for the backward of the call", text(size.backward)]);
    line(bytes, ["trained parameters of the layer", size.parameters.toLocaleString("en")]);
    const times = table(["measured, nearest first", "forward, µs a token", "training step, µs a token"]);
    const each = (row, ms) => String(+(1000 * ms / row.rows / row.tokens).toPrecision(3));
    for (const row of fwpkmSizes.nearest(device.value, chosen).slice(0, 3)) {
      line(times, [`S=${row.subkeys}, B=${row.rows}, T=${row.tokens} (${row.page})`, each(row, row.forward), each(row, row.train)]);
    }
    const taken = { key_dim: 512, value_dim: 512, num_heads: 1, top_k: 8, chunk_size: 512 };
    const other = Object.entries(taken).filter(([name, value]) => chosen[name] !== value).map(([name, value]) => `${name} ${value}`);
    made("p", output, { textContent: other.length ? `Measured with ${other.join(", ")}, where you chose otherwise: take the times as a direction.` : "Measured with these widths, heads and chunks." });
  };
  form.addEventListener("input", update);
  update();
}

const calculator = document.getElementById("sizes-calculator");
if (calculator) showCalculator(calculator);
