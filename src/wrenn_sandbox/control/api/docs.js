"use strict";

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className !== undefined) made.className = className;
  return made;
}

function typeOf(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" | ");
  if (schema.type === "array") return "array of " + typeOf(schema.items);
  return schema.format ? schema.type + " (" + schema.format + ")" : schema.type || "any";
}

function isInline(schema) {
  return Boolean(schema && schema.properties);
}

function fieldsOf(schema) {
  const required = new Set(schema.required || []);
  return table(["Field", "Type", "Default", ""],
    Object.entries(schema.properties || {}).map(([field, each]) => [
      field,
      typed(each),
      each.default === undefined ? "" : JSON.stringify(each.default),
      required.has(field) ? "required" : "",
    ]));
}

function nameIn(schema) {
  if (!schema) return undefined;
  if (schema.$ref) return schema.$ref.split("/").pop();
  return schema.type === "array" ? nameIn(schema.items) : undefined;
}

// The type in words; the name of a schema leads to its description.
function typed(schema) {
  const text = typeOf(schema);
  const name = nameIn(schema);
  if (name === undefined) return element("span", text);
  const link = element("a", text);
  link.href = "#schema-" + name;
  return link;
}

function table(heads, rows) {
  const made = element("table");
  const head = made.appendChild(element("tr"));
  for (const each of heads) head.appendChild(element("th", each));
  for (const row of rows) {
    const line = made.appendChild(element("tr"));
    for (const each of row) line.appendChild(element("td")).append(each);
  }
  return made;
}

function content(given) {
  const made = element("span");
  const entry = Object.entries(given || {})[0];
  if (entry) made.append(isInline(entry[1].schema) ? "" : typed(entry[1].schema), " as " + entry[0]);
  return made;
}

function showOperation(method, path, shared, operation, schemas) {
  const box = element("details");
  const summary = box.appendChild(element("summary"));
  summary.appendChild(element("span", method.toUpperCase(), "method"));
  summary.appendChild(element("code", path));
  summary.appendChild(element("span", (operation.description || "").replaceAll("`", ""), "summary"));
  const schemes = (operation.security || []).flatMap((each) => Object.keys(each));
  box.appendChild(element("p", "Credential: " + (schemes.join(" or ") || "none")));
  const parameters = [...shared, ...(operation.parameters || [])];
  if (parameters.length) {
    box.appendChild(table(["Parameter", "In", "Type"],
      parameters.map((each) => [each.name, each.in, typeOf(each.schema)])));
  }
  if (operation.requestBody) {
    box.appendChild(element("p", "Body: ")).append(content(operation.requestBody.content));
    for (const each of Object.values(operation.requestBody.content)) {
      if (isInline(each.schema)) box.appendChild(fieldsOf(each.schema));
    }
  }
  box.appendChild(table(["Status", "Body", "Meaning"],
    Object.entries(operation.responses).map(([status, each]) =>
      [status, content(each.content), each.description])));
  const form = tryIt(method, path, parameters, operation, schemas);
  if (form) box.appendChild(form);
  return box;
}

// An example of a body: what has a default has it, what is required has an empty value.
function exampleOf(schema, schemas) {
  if (!schema) return null;
  if (schema.$ref) return exampleOf(schemas[schema.$ref.split("/").pop()], schemas);
  if (schema.default !== undefined) return schema.default;
  if (schema.enum) return schema.enum[0];
  if (schema.anyOf) return exampleOf(schema.anyOf[0], schemas);
  if (schema.type === "array") return [];
  if (schema.type === "string") return "";
  if (schema.type === "integer" || schema.type === "number") return schema.minimum || 0;
  if (schema.type === "boolean") return false;
  const required = new Set(schema.required || []);
  return Object.fromEntries(Object.entries(schema.properties || {})
    .filter(([field]) => required.has(field))
    .map(([field, each]) => [field, exampleOf(each, schemas)]));
}

function field(parent, text, control) {
  const label = parent.appendChild(element("label", text + " "));
  return label.appendChild(control);
}

// The credential is nowhere but in its input, and goes to this server alone.
function headersFor(operation) {
  const secret = document.getElementById("credential").value.trim();
  if (!secret || !(operation.security || []).length) return {};
  return secret.startsWith("wrn_") ? { "X-API-Key": secret } : { Authorization: "Bearer " + secret };
}

async function said(response) {
  if (response.type === "opaqueredirect") return "A redirect, which this page does not follow";
  const type = response.headers.get("content-type") || "";
  const head = response.status + " " + response.statusText;
  if (type.startsWith("text/event-stream")) {
    await response.body.cancel();
    return head + "\nA stream, which this page does not follow";
  }
  if (/json|text/.test(type)) {
    const text = await response.text();
    try {
      return head + "\n" + JSON.stringify(JSON.parse(text), null, 2);
    } catch {
      return head + "\n" + text;
    }
  }
  // It may be of any size, and is not shown.
  const size = response.headers.get("content-length");
  if (response.body) await response.body.cancel();
  if (size === "0" || !response.body) return head;
  return head + "\n" + (size === null ? "Bytes, how many is not said" : size + " bytes");
}

// A form that sends the request, for all that is no WebSocket and no upload.
function tryIt(method, path, parameters, operation, schemas) {
  const bodies = (operation.requestBody || {}).content || {};
  const json = bodies["application/json"];
  if ("101" in operation.responses || (operation.requestBody && !json)) return undefined;
  const box = element("details");
  box.appendChild(element("summary", "Try it"));
  const inputs = parameters.filter((each) => each.in !== "header").map((each) => {
    const input = field(box, each.name, element("input"));
    return [each, input];
  });
  const body = json && field(box, "body", element("textarea"));
  if (body) {
    body.value = JSON.stringify(exampleOf(json.schema, schemas), null, 2);
    body.rows = body.value.split("\n").length + 1;
  }
  const button = box.appendChild(element("button", "Send " + method.toUpperCase()));
  const answer = box.appendChild(element("pre"));
  answer.hidden = true;
  button.addEventListener("click", async () => {
    const query = new URLSearchParams();
    let target = path;
    for (const [each, input] of inputs) {
      if (each.in === "path") {
        target = target.replace("{" + each.name + "}", () => encodeURIComponent(input.value));
      } else if (input.value) {
        query.append(each.name, input.value);
      }
    }
    const headers = headersFor(operation);
    if (body) headers["Content-Type"] = "application/json";
    const text = String(query);
    if (text) target += "?" + text;
    button.disabled = true;
    answer.hidden = false;
    answer.textContent = "...";
    try {
      answer.textContent = await said(await fetch(target, {
        method: method.toUpperCase(),
        headers,
        body: body ? body.value : undefined,
        mode: "same-origin",
        redirect: "manual",
        credentials: "omit",
        cache: "no-store",
      }));
    } catch (error) {
      answer.textContent = "No answer: " + error.message;
    } finally {
      button.disabled = false;
    }
  });
  return box;
}

function showSchema(name, schema) {
  const box = element("details");
  box.id = "schema-" + name;
  box.appendChild(element("summary")).appendChild(element("code", name));
  if (schema.description) box.appendChild(element("p", schema.description));
  box.appendChild(schema.properties ? fieldsOf(schema) : element("p", typeOf(schema)));
  return box;
}

function openTarget() {
  const target = document.getElementById(location.hash.slice(1));
  if (!target) return;
  target.open = true;
  target.scrollIntoView();
}

async function show() {
  const spec = await (await fetch("/openapi.json")).json();
  document.getElementById("title").textContent = spec.info.title + " " + spec.info.version;
  const operations = document.getElementById("operations");
  const sections = new Map();
  for (const [path, item] of Object.entries(spec.paths)) {
    for (const [method, operation] of Object.entries(item)) {
      if (method === "parameters") continue;
      const tag = (operation.tags || ["other"])[0];
      if (!sections.has(tag)) {
        const section = operations.appendChild(element("section"));
        section.appendChild(element("h2", tag));
        sections.set(tag, section);
      }
      sections.get(tag).appendChild(showOperation(
        method, path, item.parameters || [], operation, spec.components.schemas));
    }
  }
  const schemas = document.getElementById("schemas");
  for (const [name, schema] of Object.entries(spec.components.schemas)) {
    schemas.appendChild(showSchema(name, schema));
  }
}

window.addEventListener("hashchange", openTarget);
show().then(openTarget);
