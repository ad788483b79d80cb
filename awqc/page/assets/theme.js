// Light or dark: what the system prefers, until somebody chooses.

function setUpTheme() {
  const button = byId("theme");
  const preference = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const hidden = (textContent) => element("span", {className: "hidden", textContent});
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : preference.matches);
  const show = () => {
    button.replaceChildren(hidden("Switch to "), isDark() ? "Light" : "Dark", hidden(" colours"));
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  preference.addEventListener("change", show);
  show();
}
