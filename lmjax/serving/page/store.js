// What is kept over a reload: the conversation and the settings of this browser, and the API key
// of this tab.

const NAME = "lmjax";
const DEFAULTS = {
  turns: [], mode: "", chosen: [],
  options: { temperature: 0.8, top_p: 1, max_tokens: 200, seed: "", system: "" },
};

export function read() {
  try {
    const found = JSON.parse(localStorage.getItem(NAME)) ?? {};
    return { ...DEFAULTS, ...found, options: { ...DEFAULTS.options, ...found.options } };
  } catch {
    return structuredClone(DEFAULTS);
  }
}

export function write(state) {
  const kept = { ...state, turns: [...state.turns] };
  for (;;) {
    try {
      localStorage.setItem(NAME, JSON.stringify(kept));
      return;
    } catch {
      if (!kept.turns.length) return; // the browser keeps nothing at all
      kept.turns.shift(); // the browser's room is full: the oldest goes
    }
  }
}

export const readKey = () => sessionStorage.getItem(NAME) ?? "";
export const writeKey = (key) => sessionStorage.setItem(NAME, key);

export function forget() {
  localStorage.removeItem(NAME);
  sessionStorage.removeItem(NAME);
}
