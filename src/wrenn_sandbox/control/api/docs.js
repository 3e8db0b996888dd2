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

function showOperation(method, path, shared, operation) {
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
      sections.get(tag).appendChild(showOperation(method, path, item.parameters || [], operation));
    }
  }
  const schemas = document.getElementById("schemas");
  for (const [name, schema] of Object.entries(spec.components.schemas)) {
    schemas.appendChild(showSchema(name, schema));
  }
}

window.addEventListener("hashchange", openTarget);
show().then(openTarget);
