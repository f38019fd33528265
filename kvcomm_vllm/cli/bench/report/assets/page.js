// SPDX-License-Identifier: Apache-2.0
// Draws each figure from the JSON beside it, in the colours of the page.
"use strict";

const dark = matchMedia("(prefers-color-scheme: dark)");

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

function themed(layout) {
  const text = colour("--text"), line = colour("--line"), soft = colour("--soft");
  const themed = { ...layout, font: { ...layout.font, color: text, size: 12 } };
  for (const name of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key))) {
    themed[name] = { ...layout[name], gridcolor: line, linecolor: line, zerolinecolor: soft };
  }
  themed.hoverlabel = { ...layout.hoverlabel, bgcolor: colour("--card"), font: { color: text } };
  return themed;
}

function draw(figure) {
  const { data, layout } = JSON.parse(figure.querySelector("script").textContent);
  const options = { responsive: true, displayModeBar: false };
  return Plotly.react(figure.querySelector(".plot"), data, themed(layout), options);
}

function drawAll() {
  document.querySelectorAll("figure").forEach(draw);
}

dark.addEventListener("change", drawAll);
drawAll();
