"use strict";
// Search, filters and the choice of methods. Everything stands in the page already: this only hides and shows.
(() => {
  const folded = (text) => text.normalize("NFKC").toLowerCase();

  function prepare(list) {
    const controls = list.querySelector("[data-controls]");
    const control = (name) => controls.querySelector(`[data-control="${name}"]`);
    const value = (name) => control(name)?.value ?? "";
    const items = [...list.querySelectorAll("[data-item]")];
    const rest = list.querySelector("details[data-rest]");
    const count = controls.querySelector("[data-count]");

    // The two chosen sides, in the chosen order; with no choice to make, the sides as they stand.
    function sides(item) {
      const all = [...item.querySelectorAll("[data-side]")];
      if (!control("left")) return all;
      const chosen = [...new Set([value("left"), value("right")])];
      for (const side of all) side.hidden = !chosen.includes(side.dataset.side);
      const shown = chosen.flatMap((name) => all.filter((side) => side.dataset.side === name));
      for (const side of shown) side.parentNode.append(side);
      return shown;
    }

    // The second side's reward minus the first one's; NaN where one is missing.
    function difference(shown) {
      if (shown.length !== 2) return NaN;
      return Number(shown[1].dataset.reward || NaN) - Number(shown[0].dataset.reward || NaN);
    }

    function kind(change) {
      return change > 0 ? "gain" : change < 0 ? "loss" : Number.isNaN(change) ? "unknown" : "same";
    }

    function matches(item, query) {
      const shown = sides(item);
      const change = difference(shown);
      const note = item.querySelector("[data-change]");
      if (note) {
        const sign = change > 0 ? "+" : change < 0 ? "\u2212" : "";
        note.textContent = Number.isNaN(change) ? "" : `difference ${sign}${Math.abs(change).toFixed(3)}`;
      }
      const origin = value("origin");
      const parts = [...item.querySelectorAll("[data-origin]")];
      for (const part of parts) part.hidden = origin !== "" && part.dataset.origin !== origin;
      if (parts.length && parts.every((part) => part.hidden)) return false;
      if (value("kind") && value("kind") !== kind(change)) return false;
      const texts = [...item.querySelectorAll("[data-text]")].filter((text) => !text.closest("[data-side][hidden], [data-origin][hidden]"));
      const found = texts.filter((text) => folded(text.textContent).includes(query));
      for (const fold of item.querySelectorAll("details")) {
        fold.toggleAttribute("data-hit", query !== "" && found.some((text) => fold.contains(text)));
      }
      return found.length > 0;
    }

    function update() {
      const query = folded(value("search").trim());
      let shown = 0;
      for (const item of items) {
        const match = matches(item, query);
        item.hidden = !match;
        shown += match;
      }
      for (const part of list.querySelectorAll("[data-part]")) part.hidden = !part.querySelector("[data-item]:not([hidden])");
      const narrowed = query !== "" || value("kind") !== "" || value("origin") !== "";
      if (rest) {
        rest.hidden = !rest.querySelector("[data-item]:not([hidden])");
        if (narrowed) rest.open = true;
      }
      count.textContent = narrowed ? `${shown} of ${items.length}` : `${items.length}`;
    }

    controls.hidden = false;
    controls.addEventListener("input", update);
    controls.addEventListener("change", update); // a choice made by a driver or an older browser comes without "input"
    update();
  }

  for (const list of document.querySelectorAll("[data-list]")) prepare(list);
})();
