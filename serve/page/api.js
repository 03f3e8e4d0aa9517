// A client of the API. Paths are relative because the application may have a route prefix.

/** An error that the API reports, or a server that cannot be reached. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server responded with status ${status}`);
    this.status = status;
  }
}

/** Calls the server that the page came from. Only this object holds the API key. */
export class Api {
  key = "";

  /** The models that requests can name: [{id, parent}, …]. */
  async models() {
    return JSON.parse(await this.#text("v1/models")).data;
  }

  /** A model's card as text, because JavaScript's numbers do not tell 1 (a count) from 1.0 (a fraction). */
  async model(name) {
    return this.#text(`v1/models/${encodeURIComponent(name)}`);
  }

  /** The names that fields of a request's `skip` take, by field. */
  async methods() {
    const { schemas } = JSON.parse(await this.#text("openapi.json")).components;
    const name = Object.keys(schemas).find((schema) => schema.startsWith("SkipConfig"));
    const { select, merge } = schemas[name].properties;
    return { select: select.enum, merge: merge.enum };
  }

  /** The fates of the patches of the images in `body`. */
  async overlay(body, signal) {
    return JSON.parse(await this.#text("v1/overlay", body, signal)).data;
  }

  /** The chunks of a streamed answer, as they arrive. */
  async *chat(body, signal) {
    const response = await this.#fetch("v1/chat/completions", body, signal);
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ApiError(200, { message: "the connection closed before the answer was complete" });
      text += value;
      const events = text.split("\n\n");
      text = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ApiError(200, chunk.error);
        yield chunk;
      }
    }
  }

  async #text(path, body, signal) {
    return (await this.#fetch(path, body, signal)).text();
  }

  async #fetch(path, body, signal) {
    const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
    if (body) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method: body ? "POST" : "GET", headers, body, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, { message: `the server cannot be reached (${error.message})` });
    }
    if (response.ok) return response;
    const content = await response.json().catch(() => ({}));
    throw new ApiError(response.status, content.error);
  }
}
