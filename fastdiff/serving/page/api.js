// Requests to the server that this page comes from.

export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.code = error.code;
  }
}

function headers(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function checked(response) {
  if (response.ok) return response;
  let error = { message: `the server answered with status ${response.status}`, code: null };
  try {
    error = (await response.json()).error;
  } catch {
    // an answer that is not the server's own, such as a proxy's
  }
  throw new ApiError(response.status, error);
}

export async function models(key) {
  const response = await checked(await fetch("v1/models", { headers: headers(key) }));
  return (await response.json()).data;
}

// Yield [kind, data] of each event of a drawing.
export async function* draw(body, key, signal) {
  const response = await checked(
    await fetch("v1/images/generations", {
      method: "POST",
      headers: { "content-type": "application/json", ...headers(key) },
      body: JSON.stringify(body),
      signal,
    }),
  );
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const kind = /^event: (.*)$/m.exec(block);
      const data = /^data: (.*)$/m.exec(block);
      if (!kind || !data) continue;
      const parsed = JSON.parse(data[1]);
      if (kind[1] === "error") throw new ApiError(200, parsed.error);
      yield [kind[1], parsed];
    }
  }
}

// The metrics, as sums over their labels by name.
export async function metrics() {
  const text = await (await checked(await fetch("metrics"))).text();
  const sums = {};
  for (const line of text.split("\n")) {
    const found = /^(\w+)(?:\{.*\})? ([-+.\deE]+)$/.exec(line);
    if (found) sums[found[1]] = (sums[found[1]] ?? 0) + Number(found[2]);
  }
  return sums;
}

export async function bitmap(base64) {
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  return createImageBitmap(new Blob([bytes], { type: "image/png" }));
}
