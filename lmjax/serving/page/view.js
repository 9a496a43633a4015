// What is on the page. Text of models and people only becomes text nodes, never markup.

const $ = (id) => document.getElementById(id);

export function make(tag, className = "", text = "", more = {}) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return Object.assign(node, more);
}

const SIGNS = { " ": "\u00b7", "\n": "\u21b5", "\t": "\u2192", "\r": "\u240d" };
const visible = (text) => text.replace(/[ \n\t\r]/g, (sign) => SIGNS[sign]) || "\u2205";
const percent = (p) => (p >= 0.0995 ? `${(p * 100).toFixed(0)} %` : `${(p * 100).toPrecision(2)} %`);

// One answer on the page.
export class Answer {
  constructor(model, { given = "", named, onAgain }) {
    this.node = make("section", "answer");
    this.node.setAttribute("aria-label", `Answer of ${model}`);
    if (named) this.node.append(make("h2", "", model));
    this.text = make("div", "text");
    if (given) this.text.append(make("span", "given", given));
    this.foot = make("div", "foot");
    this.note = make("span");
    this.again = make("button", "", "Regenerate", { type: "button", onclick: onAgain });
    const copy = make("button", "", "Copy", { type: "button" });
    copy.onclick = () => navigator.clipboard?.writeText(this.text.textContent);
    this.foot.append(this.note, this.again, copy);
    this.node.append(this.text, this.foot);
    this.walk();
  }

  busy(on) {
    this.node.classList.toggle("busy", on);
    this.node.setAttribute("aria-busy", String(on));
    this.foot.hidden = on;
  }

  add(piece) {
    const [text, p, others] = piece;
    // A line end has no width of its own: it gets a faint sign to point at.
    const token = make("span", text.startsWith("\n") ? "token line" : "token", text);
    // From 0 for what had to come to 1 for a chance of 1 in 1024.
    token.style.setProperty("--s", Math.min(1, -Math.log2(Math.max(p, 1e-9)) / 10).toFixed(3));
    token.tabIndex = this.text.querySelector(".token") ? -1 : 0;
    token.piece = [text, p, others];
    this.text.append(token);
  }

  end(note, failed = false) {
    this.note.textContent = note;
    this.note.className = failed ? "failed" : "";
  }

  // The arrow keys go from token to token; the Tab key passes all of them in one step.
  walk() {
    this.text.addEventListener("keydown", (event) => {
      const next = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" };
      const to = event.target[next[event.key]];
      if (!to?.classList.contains("token")) return;
      event.preventDefault();
      event.target.tabIndex = -1;
      to.tabIndex = 0;
      to.focus();
    });
  }
}

// The box beside a token: how likely it was, and what else was.
export function watchTokens(root) {
  const tip = $("tip");
  const hide = () => { tip.hidden = true; };
  const show = (event) => {
    const token = event.target.closest?.(".token");
    if (!token) return hide();
    fill(tip, token.piece);
    tip.hidden = false;
    const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const high = tip.offsetHeight;
    const top = box.bottom + high + 10 < innerHeight ? box.bottom + 6 : box.top - high - 6;
    tip.style.top = `${Math.max(6, top)}px`;
    tip.style.left = `${Math.max(6, Math.min(box.left, innerWidth - tip.offsetWidth - 6))}px`;
    token.setAttribute("aria-describedby", "tip");
  };
  for (const name of ["mouseover", "focusin"]) root.addEventListener(name, show);
  for (const name of ["mouseleave", "focusout"]) root.addEventListener(name, hide);
  root.addEventListener("scroll", hide, { passive: true });
}

function fill(tip, [text, p, others]) {
  const rows = others.some(([other]) => other === text) ? others : [...others, [text, p]];
  const table = make("table");
  for (const [other, chance] of rows) {
    const row = make("tr", other === text ? "taken" : "");
    const bar = make("td");
    bar.append(make("meter", "", "", { value: chance, max: 1 }));
    row.append(make("td", "", visible(other)), make("td", "", percent(chance)), bar);
    table.append(row);
  }
  tip.replaceChildren(table);
}

export function problem(message) {
  $("problem").textContent = message;
  $("problem").hidden = !message;
}

export function say(message) {
  $("status").textContent = message;
}
