// Shows /openapi.json. Everything from it goes in as text, never as HTML.
"use strict";

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function resolve(spec, node) {
  if (!node || !node.$ref) return node || {};
  return node.$ref.slice(2).split("/").reduce((found, step) => found[step], spec);
}

function typeOf(spec, schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  const types = [].concat(schema.type || "any").join(" or ");
  return schema.items ? `${types} of ${typeOf(spec, schema.items)}` : types;
}

function table(rows) {
  const made = element("table");
  for (const cells of rows) {
    const row = made.appendChild(element("tr"));
    for (const cell of cells) row.appendChild(element("td", cell));
  }
  return made;
}

function fields(spec, schema) {
  const found = resolve(spec, schema.items || schema);
  const required = new Set(found.required || []);
  return Object.entries(found.properties || {}).map(([name, one]) => [
    name + (required.has(name) ? "" : "?"), typeOf(spec, one), one.description || "",
  ]);
}

function body(spec, title, media, content) {
  const made = element("div");
  made.append(element("h3", `${title}: ${media}`));
  const rows = fields(spec, content.schema);
  if (rows.length) made.append(table(rows));
  if (content.example) made.append(element("pre", JSON.stringify(content.example, null, 2)));
  return made;
}

function curl(method, path, operation) {
  const url = location.origin + path.replace("{ref}", "api-demo").replace("{path}", "index.html")
    .replace("{sandbox_path}", "%2Fworkspace");
  const content = operation.requestBody && operation.requestBody.content["application/json"];
  const lines = [`curl -X ${method} ${url}`];
  if (content) {
    const text = JSON.stringify(content.example).replaceAll("'", "'\\''");
    lines.push(`-H "Content-Type: application/json"`, `-d '${text}'`);
  }
  return lines.join(" \\\n  ");
}

function operationOf(spec, method, path, shared, operation) {
  const made = element("details", undefined, { id: operation.operationId });
  const summary = made.appendChild(element("summary"));
  summary.append(element("span", method, { class: `method ${method}` }), element("code", path),
    ` ${operation.summary || ""}`);
  if (operation.description) made.append(element("p", operation.description));
  made.append(element("pre", curl(method, path, operation)));
  const parameters = [...shared, ...(operation.parameters || [])];
  if (parameters.length) {
    made.append(element("h3", "Parameters"), table(parameters.map((one) => [
      one.name + (one.required ? "" : "?"), `${one.in}, ${typeOf(spec, one.schema)}`,
      one.description || "",
    ])));
  }
  const sent = (operation.requestBody || {}).content || {};
  for (const [media, content] of Object.entries(sent)) {
    made.append(body(spec, "Request", media, content));
  }
  const problems = [];
  for (const [status, answer] of Object.entries(operation.responses)) {
    const told = resolve(spec, answer);
    if (status >= "400") {
      problems.push([status, told.description]);
      continue;
    }
    const content = Object.entries(told.content || {});
    if (!content.length) made.append(element("h3", `${status} ${told.description}`));
    for (const [media, one] of content) made.append(body(spec, status, media, one));
  }
  made.append(element("h3", "Problems"), table(problems));
  return made;
}

function show(spec) {
  document.getElementById("version").textContent = spec.info.version;
  document.getElementById("about").textContent = spec.info.description;
  const main = document.getElementById("operations");
  main.replaceChildren();
  const sections = new Map();
  for (const [path, operations] of Object.entries(spec.paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      if (method === "parameters") continue;
      const tag = operation.tags[0];
      if (!sections.has(tag)) {
        const section = main.appendChild(element("section"));
        section.append(element("h2", tag));
        sections.set(tag, section);
      }
      sections.get(tag).append(
        operationOf(spec, method.toUpperCase(), path, operations.parameters || [], operation));
    }
  }
}

function filter(event) {
  const wanted = event.target.value.toLowerCase();
  for (const one of document.querySelectorAll("details")) {
    one.hidden = !one.textContent.toLowerCase().includes(wanted);
  }
}

document.getElementById("filter").addEventListener("input", filter);
fetch("/openapi.json")
  .then((answer) => answer.ok ? answer.json() : Promise.reject(new Error(answer.statusText)))
  .then(show)
  .catch((error) => { document.getElementById("operations").textContent = String(error); });
