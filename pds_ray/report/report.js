// Draws the report from the JSON beside it. Untrusted text becomes text nodes, never markup.
"use strict";
(() => {
  const PAGE = 60; // cards built at a time
  const data = JSON.parse(document.getElementById("data").textContent);
  const main = document.getElementById("main");
  const sections = [];
  const number = new Intl.NumberFormat("en");
  const count = (value) => (value === null || value === undefined ? "–" : number.format(value));
  const plural = (value, one, many) => `${count(value)} ${value === 1 ? one : many}`;

  // An element: attributes as they are, listeners under `on`, children as nodes or text; null children are left out.
  function el(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
    }
    node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
    return node;
  }

  function section(id, title, ...content) {
    const node = el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), ...content);
    sections.push([id, title, node]);
    main.append(node);
    return node;
  }

  // Columns are {name, number}; a row is a list of cells, or {cells, first} where a group of rows begins.
  function table(label, columns, rows) {
    const cell = (value, at) => {
      const kind = columns[at].number ? "number" : columns[at].text ? "text" : null;
      return el(at === 0 ? "th" : "td", { class: kind, scope: at === 0 ? "row" : null }, value);
    };
    const head = columns.map(({ name, number: right }) => el("th", { scope: "col", class: right ? "number" : null }, name));
    const body = rows.map((row) => {
      const cells = Array.isArray(row) ? row : row.cells;
      return el("tr", { class: row.first ? "first" : null }, cells.map(cell));
    });
    return el(
      "div",
      { class: "scroll", role: "region", tabindex: "0", "aria-label": label },
      el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, body)),
    );
  }

  const values = (entries) => el("dl", { class: "values" }, entries.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));

  function flat(value, prefix = "") {
    if (value === null || typeof value !== "object") return [[prefix, String(value)]];
    return Object.entries(value).flatMap(([name, inner]) => flat(inner, prefix ? `${prefix}.${name}` : name));
  }

  function imageElement(source, alt, size) {
    if (!source) return el("div", { class: "image gone" }, "no image");
    const [width, height] = size || [null, null];
    return el("img", { class: "image", src: source, alt, loading: "lazy", decoding: "async", width, height });
  }

  // ---------------------------------------------------------------- charts: Plotly starts when the first comes near

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Set();
  let figures = null;
  let near = null;

  function chart(name, title, note, kind) {
    if (!data.charts.includes(name)) return null;
    const box = el("div", { class: "chart", "data-figure": name, role: "img" });
    if (near) prepare(box);
    return el("figure", { class: kind }, title ? el("figcaption", {}, el("h3", {}, title), note ? el("p", {}, note) : null) : null, box);
  }

  function prepare(box) {
    const { label, figure } = figures[box.dataset.figure];
    box.setAttribute("aria-label", label);
    box.style.minHeight = `${figure.layout.height}px`;
    near.observe(box);
  }

  function startPlotly() {
    if (window.Plotly) return;
    const script = document.createElement("script"); // the page's policy knows its hash
    script.textContent = document.getElementById("plotly").textContent;
    document.head.append(script);
    document.getElementById("plotly").remove();
  }

  function themed(value) {
    if (typeof value === "string") return dark.matches && Object.hasOwn(data.palette, value) ? data.palette[value] : value;
    if (Array.isArray(value)) return value.map(themed);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, themed(inner)]));
  }

  function draw(box) {
    startPlotly();
    const { figure } = figures[box.dataset.figure];
    const layout = themed(figure.layout);
    const meta = layout.meta || {};
    if (meta.square) {
      const { l, r, t, b } = layout.margin;
      layout.height = box.clientWidth - l - r + t + b;
    }
    if (meta.zoom && matchMedia("(pointer: fine)").matches) layout.dragmode = "zoom"; // on touch a drag scrolls the page
    box.style.minHeight = `${layout.height}px`;
    window.Plotly.react(box, themed(figure.data), layout, { displayModeBar: false, responsive: true });
    drawn.add(box);
  }

  function startCharts() {
    figures = JSON.parse(document.getElementById("figures").textContent);
    near = new IntersectionObserver(
      (entries) => {
        for (const entry of entries) {
          if (!entry.isIntersecting) continue;
          near.unobserve(entry.target);
          draw(entry.target);
        }
      },
      { rootMargin: "500px 0px" },
    );
    document.querySelectorAll(".chart").forEach(prepare);
    addEventListener("beforeprint", () => document.querySelectorAll(".chart").forEach((box) => drawn.has(box) || draw(box)));
    dark.addEventListener("change", () => drawn.forEach((box) => (box.isConnected ? draw(box) : drawn.delete(box))));
  }

  // ---------------------------------------------------------------- header and contents

  function header(title, reading, facts, tiles, notes) {
    document.title = title;
    document.getElementById("header").append(
      el("h1", {}, title),
      el("p", { class: "lead" }, reading),
      facts.length ? el("dl", { class: "facts" }, facts.map(({ name, value }) => el("div", {}, el("dt", {}, name), el("dd", {}, value)))) : "",
      tiles.length
        ? el("ul", { class: "tiles", "aria-label": "Key figures" }, tiles.map(({ label, value, note }) =>
            el("li", {}, el("span", { class: "label" }, label), el("span", { class: "value" }, value), el("span", { class: "note" }, note))))
        : "",
      notes.length ? el("ul", { class: "notes", "aria-label": "Notes" }, notes.map((note) => el("li", {}, note))) : "",
    );
  }

  function contents() {
    const links = new Map(sections.map(([id, title, node]) => [node, el("a", { href: `#${id}` }, title)]));
    document.getElementById("contents").append(el("ol", {}, [...links.values()].map((link) => el("li", {}, link))));
    const seen = new Set();
    const watch = new IntersectionObserver(
      (entries) => {
        for (const { target, isIntersecting } of entries) isIntersecting ? seen.add(target) : seen.delete(target);
        const current = sections.map(([, , node]) => node).find((node) => seen.has(node));
        for (const [node, link] of links) node === current ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
      },
      { rootMargin: "-25% 0px -60% 0px" },
    );
    for (const node of links.keys()) watch.observe(node);
  }

  // ---------------------------------------------------------------- the pairs

  const known = (value) => value !== null && value !== undefined;
  const cosine = (value) => (known(value) ? value.toFixed(3) : "–");
  const by = (key, sign) => (a, b) => (key(a) === key(b) ? 0 : !known(key(a)) ? 1 : !known(key(b)) ? -1 : key(a) < key(b) ? -sign : sign);
  const ORDERS = [
    ["pair", "pair number", by((pair) => pair.pair, 1)],
    ["cosine-down", "cosine, highest first", by((pair) => pair.cosine, -1)],
    ["cosine-up", "cosine, lowest first", by((pair) => pair.cosine, 1)],
    ["shared-down", "shared pairs, most first", by((pair) => pair.shared, -1)],
    ["shared-up", "shared pairs, fewest first", by((pair) => pair.shared, 1)],
    ["caption", "caption, A to Z", by((pair) => pair.folded, 1)],
  ];

  function gallery() {
    const { list, thumbs } = data.pairs;
    for (const pair of list) pair.folded = pair.caption.toLowerCase();
    const nearest = list.some((pair) => pair.nearest.length);
    const sharing = list.some((pair) => known(pair.shared));
    let shown = list;
    let terms = [];
    let page = 0;

    const search = el("input", { type: "search", id: "search", autocomplete: "off", spellcheck: "false", on: { input: () => select() } });
    const orders = ORDERS.filter(([name]) => sharing || !name.startsWith("shared"));
    const sort = el("select", { id: "sort", on: { change: () => select() } }, orders.map(([value, name]) => el("option", { value }, name)));
    const toggle = el("input", { type: "checkbox", id: "near", checked: "", on: { change: () => cards.classList.toggle("hide-near", !toggle.checked) } });
    const found = el("span", { "aria-live": "polite", id: "found" });
    const pagers = [el("span", { class: "pager" }), el("span", { class: "pager" })];
    const cards = el("ul", { class: "gallery", id: "gallery" });

    function select() {
      terms = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const compare = ORDERS.find(([name]) => name === sort.value)[2];
      shown = list.filter((pair) => terms.every((term) => pair.folded.includes(term))).sort((a, b) => compare(a, b) || a.pair - b.pair);
      page = 0;
      show();
    }

    function turn(to, focus) {
      page = to;
      show();
      cards.scrollIntoView({ block: "start" });
      if (focus) cards.querySelector("button")?.focus({ preventScroll: true });
    }

    function show() {
      const from = page * PAGE;
      const pages = Math.ceil(shown.length / PAGE);
      found.textContent = terms.length ? `${plural(shown.length, "pair", "pairs")} of ${count(list.length)}` : plural(list.length, "pair", "pairs");
      for (const [at, pager] of pagers.entries()) {
        pager.replaceChildren();
        if (pages < 2) continue;
        pager.append(
          el("button", { class: "plain", type: "button", disabled: page === 0 ? "" : null, "aria-label": "Previous page", on: { click: () => turn(page - 1, at) } }, "‹"),
          `${count(from + 1)}–${count(Math.min(from + PAGE, shown.length))} of ${count(shown.length)}`,
          el("button", { class: "plain", type: "button", disabled: page === pages - 1 ? "" : null, "aria-label": "Next page", on: { click: () => turn(page + 1, at) } }, "›"),
        );
      }
      cards.replaceChildren(...shown.slice(from, from + PAGE).map(card));
      if (!shown.length) cards.append(el("li", { class: "quiet" }, "No caption holds all of these words."));
    }

    // Text with the searched words marked: pieces of text, never markup.
    function marked(text) {
      const pieces = [];
      const folded = text.toLowerCase();
      if (!terms.length || folded.length !== text.length) return [text]; // folding moved the places
      let at = 0;
      while (at < text.length) {
        const hits = terms.map((term) => [folded.indexOf(term, at), term.length]).filter(([place]) => place >= 0);
        if (!hits.length) break;
        const [place, length] = hits.sort((a, b) => a[0] - b[0] || b[1] - a[1])[0];
        pieces.push(text.slice(at, place), el("mark", {}, text.slice(place, place + length)));
        at = place + length;
      }
      return [...pieces, text.slice(at)];
    }

    function neighbour(item, named) {
      const image = item.thumb === null ? el("span", { class: "gone" }, "–") : el("img", { src: thumbs[item.thumb], alt: named ? `real image ${item.key}` : "", loading: "lazy", decoding: "async" });
      return el("span", { title: `real image ${item.shard}/${item.key}` }, image, el("small", {}, cosine(item.cosine), named ? [el("br"), item.key, el("br"), item.shard] : []));
    }

    function card(pair) {
      return el(
        "li",
        {},
        el(
          "button",
          { class: "card", type: "button", "data-pair": pair.pair, "aria-haspopup": "dialog", "aria-label": `Pair ${pair.pair}: ${pair.caption}`, on: { click: () => open(pair) } },
          imageElement(pair.image, "", pair.size),
          pair.nearest.length ? el("span", { class: "near", "aria-hidden": "true" }, pair.nearest.map((item) => neighbour(item, false))) : null,
          el("span", { class: "words", dir: "auto" }, marked(pair.caption)),
          el("span", { class: "figures" }, el("span", {}, `№ ${pair.pair}`), known(pair.cosine) ? el("span", {}, `cos ${cosine(pair.cosine)}`) : null, known(pair.shared) ? el("span", {}, `${count(pair.shared)} shared`) : null),
        ),
      );
    }

    const detail = document.getElementById("detail");
    let current = null;

    function open(pair) {
      current = pair;
      const at = shown.indexOf(pair);
      const step = (by_, name, sign) => el("button", { class: "plain", type: "button", id: name, disabled: shown[at + by_] ? null : "", "aria-label": `${name} pair`, on: { click: () => move(by_, name) } }, sign);
      const members = new Map();
      for (const member of pair.members) members.set(member, (members.get(member) || 0) + 1);
      detail.replaceChildren(
        el("div", { class: "bar" }, el("strong", {}, `Pair ${pair.pair}`), step(-1, "previous", "←"), step(1, "next", "→"), el("button", { class: "plain", type: "button", id: "close", autofocus: "", on: { click: () => detail.close() } }, "Close")),
        el(
          "div",
          { class: "detail" },
          el("div", {}, imageElement(pair.image, `image of pair ${pair.pair}`, pair.size)),
          el(
            "div",
            {},
            el("blockquote", { id: "detail-caption", dir: "auto" }, pair.caption),
            values([
              ...(known(pair.cosine) ? [["cosine of prototypes", cosine(pair.cosine)]] : []),
              ...(known(pair.shared) ? [["shared pairs", count(pair.shared)]] : []),
              ...(pair.size ? [["image", `${pair.size[0]} × ${pair.size[1]} pixels`]] : []),
              ...Object.entries(pair.details).filter(([name]) => !(pair.nearest.length && name.startsWith("nearest"))).map(([name, value]) => [name.replaceAll("_", " "), typeof value === "object" ? JSON.stringify(value) : String(value)]),
            ]),
            pair.nearest.length ? el("h3", {}, pair.nearest.length > 1 ? "Nearest real images" : "Nearest real image") : null,
            pair.nearest.length ? el("p", { class: "quiet" }, "By cosine to the image prototype.") : null,
            pair.nearest.length ? el("div", { class: "near" }, pair.nearest.map((item) => neighbour(item, true))) : null,
            members.size ? el("h3", {}, "Some of the pairs it averages") : null,
            members.size ? el("ul", { class: "members" }, [...members].map(([name, times]) => el("li", {}, times > 1 ? `${name} (${times} captions)` : name))) : null,
          ),
        ),
      );
      if (!detail.open) detail.showModal();
      detail.scrollTop = 0;
    }

    function move(by_, focus) {
      const to = shown[shown.indexOf(current) + by_];
      if (!to) return;
      open(to);
      const button = focus && document.getElementById(focus);
      (button && !button.disabled ? button : document.getElementById("close")).focus();
    }

    detail.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") move(-1);
      else if (event.key === "ArrowRight") move(1);
    });
    detail.addEventListener("click", (event) => event.target === detail && detail.close());
    detail.addEventListener("close", () => {
      const at = shown.indexOf(current);
      if (at >= 0 && Math.floor(at / PAGE) !== page) {
        page = Math.floor(at / PAGE); // the reader walked on: the card to come back to is on another page
        show();
      }
      cards.querySelector(`[data-pair="${Number(current.pair)}"]`)?.focus();
    });

    const some = data.pairs_total > list.length ? ` The first ${count(list.length)} of ${count(data.pairs_total)} pairs are on this page.` : "";
    section(
      "pairs",
      "The pairs",
      el("p", { class: "quiet" }, (nearest ? "Under each image stand the real images nearest to its image prototype, with their cosines." : "An image and its caption make a pair.") + some),
      el("div", { class: "tools", role: "search" }, el("label", {}, "Search the captions", search), el("label", {}, "Sort by", sort), nearest ? el("label", { class: "check" }, toggle, "nearest images") : null),
      el("div", { class: "status" }, found, pagers[0]),
      cards,
      el("div", { class: "status below" }, pagers[1]),
    );
    select();
  }

  // ---------------------------------------------------------------- the other sections of a run

  function learnedSection() {
    const { about, parts, pairs, images, factor } = data.learned;
    const before = images.some((item) => item.start);
    const words = [`${about.distiller} learned ${parts.join(", ")} with backbone ${about.backbone}.`];
    if (before) words.push(`Below stand the start, the result and their difference, ${factor} times as strong around grey.`);
    if (images.length < pairs) words.push(`The first ${count(images.length)} of ${count(pairs)} pairs are shown.`);
    const KINDS = ["start", "result", "difference"];
    section(
      "learned",
      "What was learned",
      el("p", { class: "quiet" }, words.join(" ")),
      el("ol", { class: "learned" }, images.map((item) =>
        el("li", {}, KINDS.filter((kind) => item[kind]).map((kind) => el("img", { src: item[kind], alt: `${kind} of pair ${item.pair}`, title: kind, loading: "lazy", decoding: "async" })), el("small", {}, `№ ${item.pair}`)))),
      el(
        "div",
        { class: "charts" },
        chart("learned-ratios", "Ratios of the branches", "How far the student ends from the expert's weights, over how far it began; below 1 it came nearer."),
        chart("learned-losses", "Other figures of the optimisation"),
        chart("similarity-before", "Similarity before", "A row per image, a column per text vector."),
        chart("similarity-after", "Similarity after", "On the same scale."),
      ),
    );
  }

  function clustersSection() {
    const { clusters } = data;
    const words = [`${plural(clusters.clusters, "cluster", "clusters")} per modality; ${count(clusters.empty.image)} image and ${count(clusters.empty.text)} text clusters are empty.`];
    if (known(clusters.pairless)) words.push(`${plural(clusters.pairless, "match shares", "matches share")} no pair${clusters.pairless ? ` (${clusters.pairless_policy})` : ""}.`);
    if (known(clusters.shared_pairs)) words.push(`${count(clusters.shared_pairs)} of ${count(clusters.kept_pairs)} kept pairs lie in matched clusters.`);
    const some = clusters.matches_total > clusters.matches_shown ? `The ${count(clusters.matches_shown)} matches that share most, of ${count(clusters.matches_total)}. ` : "";
    section(
      "clusters",
      "Clusters and matching",
      el("p", { class: "quiet" }, words.join(" ")),
      el(
        "div",
        { class: "charts matched" },
        chart("contingency", "Image clusters against text clusters", `${some}Ordered so that matched clusters meet on the diagonal; the colour tells the number of pairs, on a logarithmic scale.`, "wide"),
        chart("sizes", "Cluster sizes", "How many kept pairs fall in each cluster."),
        chart("shared", "Shared pairs", "How many pairs each match of two clusters shares."),
      ),
    );
  }

  function spaceSection() {
    section(
      "space",
      "The embedding space",
      el("p", { class: "quiet" }, `Principal components of unit-length embeddings, fitted on a sample of ${count(data.space.fitted_on.image)} images and of ${count(data.space.fitted_on.text)} captions. Two directions show only a part of the space: near on a map need not be near in it.`),
      el("div", { class: "charts" }, chart("map-image", "Images"), chart("map-text", "Captions")),
    );
  }

  function droppedSection() {
    const { dropped } = data;
    const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");
    const rows = dropped.steps.map(({ what, count: many, of, why }) => [what, count(many), share(many, of), why]);
    rows.unshift(["bad samples", count(dropped.bad), share(dropped.bad, dropped.samples), dropped.bad ? "could not be used; by reason below" : "none"]);
    const parts = [];
    if (dropped.flow) {
      const kinds = [["shared", "shared", "in matched clusters"], ["outside", "not shared", "outside matched clusters"], ["pruned", "pruned", "pruned"]];
      const total = kinds.reduce((sum, [, name]) => sum + dropped.flow[name], 0);
      const bar = el("div", { class: "flow", role: "img", "aria-label": "Where the pairs went; the figures stand below." }, kinds.map(([kind, name]) => {
        const piece = el("span", { class: kind });
        piece.style.flexGrow = dropped.flow[name] / Math.max(total, 1);
        return piece;
      }));
      parts.push(bar, el("ul", { class: "key" }, kinds.map(([kind, name, words]) => el("li", {}, el("i", { class: kind }), `${count(dropped.flow[name])} ${words}, ${share(dropped.flow[name], total)}`))));
    }
    parts.push(table("What was dropped", [{ name: "what" }, { name: "how many", number: true }, { name: "share", number: true }, { name: "why", text: true }], rows));
    if (dropped.reasons.length) parts.push(table("Bad samples by reason", [{ name: "reason" }, { name: "samples", number: true }, { name: "share", number: true }], dropped.reasons.map(({ reason, count: many }) => [reason.replaceAll("_", " "), count(many), share(many, dropped.samples)])));
    if (dropped.examples.length) {
      parts.push(table("Examples of bad samples", [{ name: "reason" }, { name: "shard" }, { name: "key", text: true }, { name: "detail", text: true }], dropped.examples.map((row) => [row.reason.replaceAll("_", " "), row.shard, row.key, row.detail])));
    }
    if (dropped.failed.length) parts.push(table("Shards that could not be read", [{ name: "shard" }, { name: "why", text: true }], dropped.failed.map((row) => [row.shard, row.problem])));
    section("dropped", "What was dropped, and why", ...parts);
  }

  function timeSection() {
    const rows = data.stages.map(({ stage, status, seconds, rate }) => [stage, status, seconds.toFixed(1), rate]);
    section(
      "time",
      "Time",
      el("div", { class: "charts" }, chart("stages", "Seconds of each stage")),
      table("Stages", [{ name: "stage" }, { name: "status" }, { name: "seconds", number: true }, { name: "rate", number: true }], rows),
    );
  }

  const NAMES = [["tr@1", "TR@1"], ["tr@5", "TR@5"], ["tr@10", "TR@10"], ["ir@1", "IR@1"], ["ir@5", "IR@5"], ["ir@10", "IR@10"], ["r_mean", "mean"]];
  const RECALLS = NAMES.map(([, name]) => ({ name, number: true }));
  const recall = (mean, std, ofSets) => (known(mean) ? [mean.toFixed(1), known(std) ? el("small", {}, ` ± ${std.toFixed(1)}${known(ofSets) ? ` / ${ofSets.toFixed(1)}` : ""}`) : null].filter(Boolean) : "–");
  const measured = ({ test, protocol }) => [protocol && `protocol ${protocol}`, test.source && `tested on ${test.source}`, known(test.images) && plural(test.images, "image", "images"), known(test.captions) && plural(test.captions, "caption", "captions")].filter(Boolean).join(", ");

  function evaluationSection() {
    const parts = [el("p", { class: "quiet" }, "Recall in percent of models trained on the pairs: TR finds the caption of an image, IR the image of a caption; ± is the standard deviation over trials.")];
    for (const [at, evaluation] of data.evaluations.entries()) {
      const rows = evaluation.backbones.map(({ name, trials, mean, std }) => [name, count(trials), ...NAMES.map(([key]) => recall(mean[key], std[key]))]);
      if (rows.length > 1) rows.push({ first: true, cells: ["average", "", ...NAMES.map(([key]) => recall(evaluation.mean[key], evaluation.std[key]))] });
      parts.push(
        el("div", { class: "charts" }, chart(`evaluation-${at}`, evaluation.name, measured(evaluation))),
        table(`Recalls of ${evaluation.name}`, [{ name: "backbone" }, { name: "trials", number: true }, ...RECALLS], rows),
        ...evaluation.backbones.filter(({ used }) => known(used)).map(({ name, used }) => el("p", { class: "quiet" }, `Learned parts used with ${name}: ${used}.`)),
        ...evaluation.notes.map((note) => el("p", { class: "quiet" }, note)),
      );
    }
    if (data.baselines) parts.push(el("div", { class: "charts" }, chart("baselines", `Among other methods at ${data.baselines.budget ? `${count(data.baselines.budget)} bytes` : `${count(data.baselines.pairs)} pairs`}`, "Mean of the six recalls, averaged over backbones.")));
    section("evaluation", "Evaluation", ...parts);
  }

  function makingSection() {
    const { ray, versions, config } = data.details;
    const block = (title, value) => (Object.keys(value).length ? el("details", {}, el("summary", {}, title), values(flat(value))) : null);
    const blocks = [block("Configuration", config), block("Ray", ray), block("Versions", versions)].filter(Boolean);
    if (blocks.length) section("making", "How it was made", ...blocks);
  }

  function run() {
    const { header: head } = data;
    header(head.title, head.reading, head.facts, head.tiles, data.notes);
    if (data.pairs.list.length) gallery();
    if (data.evaluations.length || data.baselines) evaluationSection();
    if (data.learned) learnedSection();
    if (data.clusters) clustersSection();
    if (data.space) spaceSection();
    if (data.dropped) droppedSection();
    if (data.stages.length) timeSection();
    makingSection();
  }

  // ---------------------------------------------------------------- a comparison

  function comparison() {
    const { methods, backbones, counts, cells } = data;
    const size = (value) => (data.budgets ? `${(value / 1e6).toLocaleString("en", { maximumSignificantDigits: 4 })} MB` : count(value));
    const named = (value) => (data.budgets ? size(value) : `${size(value)} pairs`);
    const cost = (value) => (known(value) ? count(value) : "");
    const reading = `${plural(methods.length, "method", "methods")} at ${counts.map(size).join(", ")}${data.budgets ? " of images and captions" : " pairs"}, judged by models trained on them${backbones.filter((name) => name !== "average").length ? ` (${backbones.filter((name) => name !== "average").join(", ")})` : ""}.`;
    const facts = [["source", data.source], ["protocol", data.protocol], ["test", [data.test.source, known(data.test.images) && plural(data.test.images, "image", "images"), known(data.test.captions) && plural(data.test.captions, "caption", "captions")].filter(Boolean).join(", ")], ["seeds", known(data.seeds) ? String(data.seeds) : ""], ["sets per row", known(data.set_seeds) ? String(data.set_seeds) : ""]];
    header(data.source ? `Methods compared on ${data.source}` : "Methods compared", reading, facts.filter(([, value]) => value).map(([name, value]) => ({ name, value })), [], data.notes);

    const backbone = el("select", { id: "backbone", on: { change: () => update() } }, backbones.map((name, at) => el("option", { value: at }, name === "average" ? "average of all" : name)));
    const pairs = el("select", { id: "counts", on: { change: () => update() } }, el("option", { value: "" }, "all"), counts.map((value) => el("option", { value }, size(value))));
    const results = el("div", { id: "results" });
    const plots = el("div", {});

    function update() {
      const of = backbones[backbone.value];
      const wanted = pairs.value === "" ? counts : [Number(pairs.value)];
      const rows = wanted.flatMap((value) => {
        const own = cells.filter((cell) => cell.backbone === of && cell.size === value);
        const best = Object.fromEntries(NAMES.map(([key]) => [key, Math.max(...own.map((cell) => cell.mean[key] ?? -1))]));
        return own.map((cell, at) => ({
          first: at === 0 && value !== wanted[0],
          cells: [cell.method, count(cell.pairs), cost(cell.bytes), cost(cell.pixels_per_epoch), ...NAMES.map(([key]) => { const text = recall(cell.mean[key], cell.std[key], cell.set_std[key]); return known(cell.mean[key]) && cell.mean[key] === best[key] ? el("strong", {}, text) : text; }), count(cell.trials)],
        }));
      });
      results.replaceChildren(table("Recalls by method", [{ name: "method" }, { name: "pairs", number: true }, { name: "bytes", number: true }, { name: "pixels per epoch", number: true }, ...RECALLS, { name: "trials", number: true }], rows));
      plots.replaceChildren(
        el("div", { class: "charts" }, counts.length > 1 ? chart(`lines-${backbone.value}`, "Mean recall over pairs") : ""),
        el("div", { class: "charts" },
          data.charts.includes(`bytes-${backbone.value}`) ? chart(`bytes-${backbone.value}`, "Mean recall over bytes", "Bytes of images and captions; what is higher at the same bytes is the better set.") : "",
          data.charts.includes(`pixels-${backbone.value}`) ? chart(`pixels-${backbone.value}`, "Mean recall over the cost of training", "Pixels that an epoch of training reads, at the side that the model takes.") : ""),
        el("div", { class: "charts" }, wanted.map((value) => chart(`bars-${backbone.value}-${value}`, named(value), `Mean of the six recalls; bars show the standard deviation${known(data.set_seeds) ? " over sets" : ""}.`))),
      );
    }

    section(
      "results",
      "Recalls",
      el("p", { class: "quiet" }, `In percent: TR finds the caption of an image, IR the image of a caption; ± is the standard deviation${known(data.set_seeds) ? ", over the seeds of the models / over sets" : ""}. The best of each size is bold.`),
      el("div", { class: "tools" }, el("label", {}, "Backbone", backbone), el("label", {}, data.budgets ? "Budget" : "Pairs", pairs)),
      results,
      plots,
    );
    update();
    if (data.strips.length) {
      section("sets", "First pairs of each set", data.strips.map(({ method, pairs: size, first }) =>
        el("div", { class: "strip" }, el("h3", {}, `${method}, ${plural(size, "pair", "pairs")}`),
          el("ol", { tabindex: "0", "aria-label": `First pairs of ${method}` }, first.map(({ image, caption }) => el("li", {}, imageElement(image, ""), el("p", { dir: "auto", title: caption }, caption)))))));
    }
  }

  (data.kind === "run" ? run : comparison)();
  contents();
  document.addEventListener("DOMContentLoaded", startCharts);
})();
