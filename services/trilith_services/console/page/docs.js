// The API's description, read from openapi.json and written for people.
"use strict";

function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter(Boolean));
  return made;
}

/** A schema in words, as short as it can be said. */
function kind(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.anyOf) return schema.anyOf.map(kind).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.type === "array") return `[${kind(schema.items)}]`;
  if (schema.additionalProperties) return `{… ${kind(schema.additionalProperties)}}`;
  if (schema.properties) return `{${Object.entries(schema.properties).map(([name, each]) => `${name}: ${kind(each)}`).join(", ")}}`;
  return schema.type ?? "anything";
}

function route(verb, path, one) {
  const details = [];
  for (const each of one.parameters ?? []) {
    details.push(make("li", {}, make("code", {}, each.name), ` (${each.in}${each.required ? "" : ", optional"}) `, kind(each.schema), each.description ? `: ${each.description}` : ""));
  }
  const body = one.requestBody?.content?.["application/json"]?.schema;
  if (body) details.push(make("li", {}, "body: ", make("code", {}, kind(body))));
  const answer = one.responses["200"]?.content ?? {};
  const type = Object.keys(answer)[0];
  if (type) details.push(make("li", {}, "answers ", make("code", {}, type === "application/json" ? kind(answer[type].schema) : type)));
  const plain = verb === "get" && !path.includes("{");
  return make("div", { class: "route" }, make("span", { class: `verb ${verb}` }, verb.toUpperCase()),
    make("div", {}, plain ? make("a", { class: "mono", href: path }, path) : make("span", { class: "mono" }, path),
      make("div", {}, one.description ?? ""), make("ul", { class: "dim" }, ...details)));
}

function model(name, schema) {
  const fields = Object.entries(schema.properties ?? {}).map(([field, each]) =>
    make("li", {}, make("code", {}, field), ` ${kind(each)}`, each.description ? `: ${each.description}` : ""));
  return make("details", { class: "card", id: name }, make("summary", {}, make("code", {}, name), ` ${schema.description ?? ""}`), make("ul", {}, ...fields));
}

async function begin() {
  const api = await (await fetch("/openapi.json")).json();
  const groups = new Map();
  for (const [path, verbs] of Object.entries(api.paths)) {
    for (const [verb, one] of Object.entries(verbs)) {
      const tag = one.tags?.[0] ?? "other";
      groups.set(tag, [...(groups.get(tag) ?? []), route(verb, path, one)]);
    }
  }
  document.getElementById("docs").replaceChildren(
    make("h2", {}, api.info.title), make("p", { class: "dim" }, api.info.description),
    ...[...groups].flatMap(([tag, routes]) => [make("h2", {}, tag), make("div", { class: "card" }, ...routes)]),
    make("h2", {}, "Answers"), ...Object.entries(api.components.schemas).map(([name, schema]) => model(name, schema)));
}

begin();
