// Calls of the server: which models there are, and streams of tokens.

export class Failed extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const headers = (key) => ({
  "Content-Type": "application/json",
  ...(key ? { Authorization: `Bearer ${key}` } : {}),
});

async function refusal(reply) {
  let message = `The server answered with status ${reply.status}.`;
  try {
    message = (await reply.json()).error.message;
  } catch {
    // Not the server's own words: those of something between it and the page.
  }
  return new Failed(message, reply.status);
}

export async function models(key) {
  const reply = await fetch("/v1/models", { headers: headers(key) });
  if (!reply.ok) throw await refusal(reply);
  return (await reply.json()).data;
}

// Yields the tokens of an answer, [text, probability, [[text, probability], ...]], and at the end
// the reason why it ended.
export async function* answer({ messages, prompt, key, signal, ...options }) {
  const chat = messages !== undefined;
  const body = chat
    ? { ...options, messages, stream: true, logprobs: true, top_logprobs: 5 }
    : { ...options, prompt, stream: true, logprobs: 5 };
  const reply = await fetch(chat ? "/v1/chat/completions" : "/v1/completions", {
    method: "POST", headers: headers(key), body: JSON.stringify(body), signal,
  });
  if (!reply.ok) throw await refusal(reply);
  for await (const event of events(reply.body)) {
    if (event.error) throw new Failed(event.error.message, 500);
    const choice = event.choices[0];
    if (!choice) continue;
    const text = chat ? choice.delta.content ?? "" : choice.text;
    for (const piece of pieces(text, chat ? ofChat(choice) : ofCompletion(choice))) yield piece;
    if (choice.finish_reason) yield choice.finish_reason;
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

const ofChat = (choice) => (choice.logprobs?.content ?? []).map((token) => [
  token.token, Math.exp(token.logprob),
  token.top_logprobs.map((other) => [other.token, Math.exp(other.logprob)]),
]);

function ofCompletion(choice) {
  const scores = choice.logprobs;
  return (scores?.tokens ?? []).map((token, i) => [
    token, Math.exp(scores.token_logprobs[i]),
    Object.entries(scores.top_logprobs?.[i] ?? {}).map(([other, p]) => [other, Math.exp(p)]),
  ]);
}

// Tokens that make up the text, or else, as with the bytes of one character, all as one.
function pieces(text, tokens) {
  if (!text) return [];
  if (tokens.map(([token]) => token).join("") === text) return tokens;
  const together = tokens.reduce((product, [, p]) => product * p, 1);
  return [[text, together, tokens.length === 1 ? tokens[0][2] : []]];
}
