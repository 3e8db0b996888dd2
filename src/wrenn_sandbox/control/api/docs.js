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

function table(heads, rows) {
  const made = element("table");
  const head = made.appendChild(element("tr"));
  for (const each of heads) head.appendChild(element("th", each));
  for (const row of rows) {
    const line = made.appendChild(element("tr"));
    for (const each of row) line.appendChild(element("td", each));
  }
  return made;
}

function contentType(content) {
  const entry = Object.entries(content || {})[0];
  return entry ? typeOf(entry[1].schema) + " as " + entry[0] : "";
}

function showOperation(method, path, shared, operation) {
  const box = element("details");
  const summary = box.appendChild(element("summary"));
  summary.appendChild(element("span", method.toUpperCase(), "method"));
  summary.appendChild(element("code", path));
  if (operation.description) box.appendChild(element("p", operation.description));
  const schemes = (operation.security || []).flatMap((each) => Object.keys(each));
  box.appendChild(element("p", "Credential: " + (schemes.join(" or ") || "none")));
  const parameters = [...shared, ...(operation.parameters || [])];
  if (parameters.length) {
    box.appendChild(table(["Parameter", "In", "Type"],
      parameters.map((each) => [each.name, each.in, typeOf(each.schema)])));
  }
  if (operation.requestBody) {
    box.appendChild(element("p", "Body: " + contentType(operation.requestBody.content)));
  }
  box.appendChild(table(["Status", "Body", "Meaning"],
    Object.entries(operation.responses).map(([status, each]) =>
      [status, contentType(each.content), each.description])));
  return box;
}

function showSchema(name, schema) {
  const box = element("details");
  box.appendChild(element("summary")).appendChild(element("code", name));
  if (schema.description) box.appendChild(element("p", schema.description));
  const required = new Set(schema.required || []);
  box.appendChild(table(["Field", "Type", "Default", ""],
    Object.entries(schema.properties || {}).map(([field, each]) => [
      field,
      typeOf(each),
      each.default === undefined ? "" : JSON.stringify(each.default),
      required.has(field) ? "required" : "",
    ])));
  return box;
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
      sections.get(tag).appendChild(showOperation(method, path, item.parameters || [], operation));
    }
  }
  const schemas = document.getElementById("schemas");
  for (const [name, schema] of Object.entries(spec.components.schemas)) {
    schemas.appendChild(showSchema(name, schema));
  }
}

show();
