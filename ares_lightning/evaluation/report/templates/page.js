for (const script of document.querySelectorAll("script[data-chart]")) {
  const { data, layout } = JSON.parse(script.textContent);
  const chart = document.getElementById(script.dataset.chart);
  const choice = document.getElementById(`${chart.id}-choice`);
  if (chart.clientWidth < 640 && layout.legend.orientation !== "h") layout.showlegend = false;
  if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false;
  const draw = () => Plotly.react(
    chart,
    data.map((trace) => ({ ...trace, visible: !choice || !trace.meta || trace.meta === choice.value })),
    layout,
    { displayModeBar: false, responsive: true },
  );
  choice?.addEventListener("change", draw);
  draw();
}

for (const controls of document.querySelectorAll(".controls[data-table]")) {
  const rows = document.getElementById(controls.dataset.table).tBodies[0].rows;
  const [search, group] = [controls.querySelector("input"), controls.querySelector("select")];
  const filter = () => {
    const words = (search?.value ?? "").toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
      row.hidden = (group && row.dataset.group !== group.value) || !words.every((word) => text.includes(word));
    }
  };
  controls.addEventListener("input", filter);
  filter();
}

for (const head of document.querySelectorAll(".sortable th:has(button)")) {
  const body = head.closest("table").tBodies[0];
  const value = (row) => row.cells[head.cellIndex].dataset.value ?? row.cells[head.cellIndex].textContent.trim();
  const isNumber = (text) => text !== "" && Number.isFinite(Number(text));
  head.querySelector("button").addEventListener("click", () => {
    const rows = [...body.rows];
    const numeric = rows.some((row) => isNumber(value(row)));
    const before = head.getAttribute("aria-sort") ?? (numeric ? "ascending" : "descending");
    const sign = before === "ascending" ? -1 : 1;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", sign < 0 ? "descending" : "ascending");
    const known = (row) => (numeric ? isNumber(value(row)) : !["", "–"].includes(value(row)));
    rows.sort((a, b) => {
      if (!known(a) || !known(b)) return known(b) - known(a);
      return sign * (numeric ? value(a) - value(b) : value(a).localeCompare(value(b), "en", { numeric: true }));
    });
    body.append(...rows);
  });
}
